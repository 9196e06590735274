"""Defines the settings of the models: the default one, those beside it, and when models come and go."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from app.config.embeddings import EmbeddingPooling
from app.config.packaged import packaged
from app.config.remote import RemoteConfig
from app.config.section import Section

ModelSource = Literal["local", "hub", "mlflow"]
EMBEDDED_MODEL = "models/tiny-chat"
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8", "bitsandbytes-8bit", "bitsandbytes-4bit"]
CompileName = Literal["auto", "none", "layers"]
EngineName = Literal["auto", "batching", "serial", "echo", "remote"]
SERVED_NAME = r"^[A-Za-z0-9][A-Za-z0-9_:-]*(?:[./][A-Za-z0-9_:-]+)*$"
"""Letters, digits and signs of which no two are dots or slashes in a row: as roles name models, and never a path."""
ServedName = Annotated[str, StringConstraints(pattern=SERVED_NAME, max_length=256)]

ToolFormatName = Literal[
    "auto",
    "none",
    "hermes",
    "qwen_xml",
    "llama",
    "mistral",
    "mistral_args",
    "deepseek",
    "deepseek_v31",
    "gemma4",
    "function_gemma",
    "phi",
    "harmony",
]
ReasoningFormatName = Literal["auto", "none", "think", "mistral", "gemma4", "harmony"]


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def _located(data: Any) -> Any:
    """Fill in where a model comes from, if that is not said, and find the embedded one."""
    if not isinstance(data, dict) or not isinstance(name := data.get("name", EMBEDDED_MODEL), str):
        return data
    source = data.get("source") or "auto"
    if source == "auto":
        source = "mlflow" if name.startswith("models:/") else "hub" if _is_on_hub(name) else "local"
    if source == "local" and (found := packaged(Path(name))) != Path(name):
        name = str(found)
    return data | {"name": name, "source": source}


def _is_on_hub(name: str) -> bool:
    """Return whether org/name is an id of the hub: where there is a folder org, it is one that is missing there."""
    return bool(_HUB_ID.fullmatch(name)) and not _is_folder(packaged(Path(name).parent))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no file can have such a name
        return False


class ModelHosting(Section):
    """When models are loaded and unloaded, and which ones a request may bring in."""

    preload: bool = True
    """Load the default model when the service starts, and not on its first use."""
    required: bool = True
    """Whether the service needs its default model: without it /readyz says 503, and a load that fails ends the start.
    It is then never evicted."""
    roots: tuple[Path, ...] = (Path("models"),)
    """Folders below which a model may be loaded at run time; empty allows none."""
    allowed: tuple[str, ...] = ()
    """Patterns such as google/* of what may be loaded at run time: hub ids, folders below their root, registry URIs.
    Empty allows any."""
    max_loaded: PositiveInt | None = None
    """Models loaded at once; for one more, the idle one that was used least recently is unloaded.  Unset: memory is the
    only limit."""
    idle_seconds: NonNegativeFloat = 0
    """A model without a request for so long is unloaded, and loaded again when it is asked for; 0 keeps it."""
    first_use: Literal["refuse", "wait"] = "refuse"
    """What a request gets that names a model which is yet to be loaded: 503 with the progress while it loads, or its
    response once it has."""
    first_use_seconds: PositiveFloat = 120
    """How long such a request waits before it gets 503 as well."""
    unload_grace_seconds: NonNegativeFloat = 30
    """How long running requests of a model may take before an unload ends them."""


class ModelConfig(ModelHosting):
    """The served model, its engine and its limits."""

    name: str = EMBEDDED_MODEL
    """A folder (source local), a Hugging Face model id (source hub) or the URI of a model in a registry (source mlflow:
    models:/name/version or models:/name@alias)."""
    source: ModelSource = "local"
    """auto, or nothing, goes by the name: models:/... is mlflow, org/name is hub where there is no folder org, and
    everything else is local."""
    served_name: ServedName | None = None
    """The name that clients see; unset is the model id, the name of the folder without its path, or the name in the
    registry."""
    device: DeviceName = "auto"
    """auto is a CUDA or Apple GPU where there is one, else the CPU."""
    dtype: DtypeName = "auto"
    """Compute type.  auto: the checkpoint's type on a GPU; on a CPU bfloat16 if both the checkpoint and the CPU use it,
    otherwise float32 (always float32 with int8)."""
    quantization: QuantizationName = "none"
    """int8 quantizes the weights of linear layers on a CPU: a quarter of their float32 memory and faster decoding of
    single requests, but log-probabilities change; /v1/models reports by how much.  On CUDA the two of bitsandbytes do,
    with its package installed.  A checkpoint that is quantized already needs none of them."""
    compile: CompileName = "auto"
    """How the model's layers are computed.  On a CPU, auto times every way at the first load (a few seconds, with a C++
    compiler) and takes the fastest for each step: all layers as one compiled operator, for model families that have
    one, or compiled linear layers and attention, or torch's; none takes torch's alone; layers the first alone, and
    refuses a model that has none.  On a CUDA GPU, auto captures decoding as CUDA graphs if it can, and layers compiles
    with torch.compile besides (a slower start)."""
    max_weight_copies: PositiveInt = 1
    """Forms of the weights that may be in memory at once, on a CPU with compile: auto.  With 2, a second one is kept
    where it makes steps of some sizes clearly faster, as prompts beside single tokens; each takes the memory of the
    whole model."""
    revision: str | None = None
    """Commit or tag of the model on the hub."""
    engine: EngineName = "auto"
    """batching uses continuous batching, serial runs one request at a time, echo needs no model and repeats the prompt;
    auto is batching, or serial for a model that cannot be batched.  remote is another server, see section `remote`."""
    max_tokens: PositiveInt = 512
    """Default of max_tokens, the new tokens of a request (fewer when the context window is nearly full)."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Default temperature; 0 is greedy."""
    max_model_len: PositiveInt | None = None
    """Context window in tokens; unset is the model's own, which is also the maximum."""
    max_batch_size: PositiveInt | None = None
    """Sequences decoded in one batch; unset takes what fits in memory, 32 at most, on a CUDA GPU 128."""
    prefix_reuse: bool = True
    """Prefix caching: reuse KV cache of the same tenant, as for the next turn of a conversation."""
    prefix_cache_bytes: NonNegativeInt = 1024**3
    """Memory for prefixes that the KV cache has no room for any more, at most; less where less is free, 0 is none."""
    speculation: Literal["none", "ngram"] = "none"
    """Speculative decoding: ngram guesses next tokens from where the last three stood before in prompt or answer, as in
    edited code and quotations, and computes them in one step.  Answers stay the same; a few tokens at once get faster,
    many answers at once do not.  Without effect on a model that cannot be batched."""
    max_waiting: NonNegativeInt = 64
    """Completions of one tenant that may wait for the model while no other tenant's do; further ones get 503."""
    max_waiting_tokens: PositiveInt = 65_536
    """Prompt tokens of those in total; a single request may always wait."""
    embeddings: EmbeddingPooling = "none"
    """Whether the chat model embeds texts, too: by the mean of its tokens' hidden states, or by the last one.  Its
    layers are then not compiled, since that leaves no hidden states to read: on a CPU it decodes more slowly."""
    threads: NonNegativeInt = 0
    """CPU threads of the model; 0 is one per core."""
    hang_seconds: Annotated[float, Field(ge=5)] = 30
    """A worker that gives no sign of life for so long is killed and started again; after 3 s it gets no requests."""
    stall_seconds: PositiveFloat = 120
    """The same for a worker that lives, has requests and makes no progress; at least
    `deadlines.first_token_seconds` and 30 s."""
    tool_format: ToolFormatName = "auto"
    """How the model writes calls of tools.  auto: as its chat template shows, hermes for a template that shows none;
    none leaves them in the text."""
    reasoning_format: ReasoningFormatName = "auto"
    """How the model marks what it thinks before it answers.  auto: as its chat template and its tokens show; none
    leaves it in the text."""
    spare_worker: bool = True
    """Keep a process whose libraries are imported for the next worker: about 260 MB, and a worker that died is replaced
    in one second instead of five."""

    _fill_in_source = model_validator(mode="before")(_located)

    @model_validator(mode="after")
    def _loads_what_it_needs(self) -> Self:
        if self.required and not self.preload:
            raise ValueError("preload: false needs required: false, since the service is ready without this model then")
        return self

    @property
    def own_name(self) -> str:
        """The name that the model brings: its id, the name of its folder, or its name in the registry."""
        if self.engine == "remote":
            return self.name
        match self.source:
            case "local":
                return Path(self.name).resolve().name
            case "mlflow":
                return re.split("[/@]", self.name.removeprefix("models:/"), maxsplit=1)[0]
            case _:
                return self.name

    @property
    def public_name(self) -> str:
        """The name that clients see: the configured one, or else the model's own."""
        if self.served_name is not None:
            return self.served_name
        return "echo" if self.engine == "echo" else self.own_name


class ModelEntry(Section):
    """One more model, loaded on its first use; what is unset is taken from section `model`."""

    name: str
    """A folder, a hub id or a registry URI, as `model.name`."""
    source: ModelSource = "local"
    served_name: ServedName | None = None
    revision: str | None = None
    preload: bool = False
    """Load it when the service starts, as `model.preload`."""
    device: DeviceName | None = None
    dtype: DtypeName | None = None
    quantization: QuantizationName | None = None
    compile: CompileName | None = None
    engine: EngineName | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_model_len: PositiveInt | None = None
    max_batch_size: PositiveInt | None = None
    embeddings: EmbeddingPooling | None = None
    threads: NonNegativeInt | None = None
    tool_format: ToolFormatName | None = None
    reasoning_format: ReasoningFormatName | None = None
    remote: RemoteConfig | None = None
    """The servers of this model where its engine is remote; unset are those of section `remote`."""

    _fill_in_source = model_validator(mode="before")(_located)

    @model_validator(mode="after")
    def _is_remote_where_servers_are_named(self) -> Self:
        if self.remote is not None and self.engine != "remote":
            raise ValueError("remote needs engine: remote")
        return self

    def config(self, defaults: ModelConfig) -> ModelConfig:
        """Return the whole configuration of the model."""
        given = self.model_dump(exclude={"preload", "remote"}, exclude_none=True)
        return beside(defaults, **given)


def beside(defaults: ModelConfig, **fields: Any) -> ModelConfig:
    """Return the configuration of another model than the default one, whose revision and name it does not share."""
    own: dict[str, Any] = {"revision": None, "served_name": None, "max_model_len": None}
    if defaults.engine in ("remote", "echo"):
        # Neither says anything of how another model is computed.
        own["engine"] = "auto"
    own |= fields
    return ModelConfig.model_validate(defaults.model_dump() | own)
