"""The messages between the API process and a model's worker process, as msgpack over one socket.

Both sides import it; it imports neither torch nor zmq.  The API process numbers the requests and never uses a number
twice, so that a late event cannot be taken for another request's.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

from app.embeddings import EmbeddingInfo
from app.types import SamplingParams, StepTimes, TokenLogprob

Compiled = Literal["attention", "graphs", "layers"]
Compile = Literal["auto", "none", "layers"]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The model to load; the fields have their meaning in `ModelConfig`."""

    name: str
    source: Literal["local", "hub"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Literal["none", "int8", "bitsandbytes-8bit", "bitsandbytes-4bit"] = "none"
    compile: Compile = "auto"
    max_weight_copies: int = 1
    """Forms of the weights that may be in memory at once, for steps that are faster in one or the other."""
    revision: str | None
    max_model_len: int | None
    engine: Literal["auto", "batching", "serial"] = "auto"
    max_batch_size: int | None = None
    """Sequences in the KV cache at once; None takes as many as fit into memory, 32 at most, on a GPU 128."""
    prefix_reuse: bool = True
    """Whether the KV cache of one request may serve another of the same tenant."""
    prefix_cache_bytes: int = 0
    """Memory for prefixes beyond the KV cache slots, at most."""
    speculation: Literal["none", "ngram"] = "none"
    """How next tokens are guessed."""
    threads: int
    """CPU threads; 0 uses one for each usable core."""
    task: Literal["generate", "embed"] = "generate"
    """What it is loaded for; a model that generates may embed, too."""
    embeddings: Literal["none", "mean", "last"] = "none"
    """How a model that generates embeds."""
    max_batch_tokens: int = 512
    """Tokens of the texts that are embedded in one pass."""
    matryoshka: bool | None = None
    """Whether vectors may be cut; None asks the model's configuration."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on the worker's standard input, as JSON; a pipe, which no other process can read."""

    endpoint: str
    """Address of the socket that the API process listens on."""
    folder: str
    """Private to the two processes; the worker saves the tokenizer in it."""
    model: ModelSpec
    hub_token: str | None = None
    """For this load alone: unlike what is in the environment, no spare process and no later start has it."""


class Submit(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Generate a completion of a prompt."""

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    tenant: str = ""
    """Tenants share the model fairly, and never reuse the KV cache of another."""
    adapter: str | None = None
    """The digest of an adapter that is loaded."""
    priority: int = 0
    """Lower is served first."""


class Embed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Return the vector of each text."""

    id: int
    inputs: tuple[tuple[int, ...], ...]
    """Token ids of each text."""
    tenant: str = ""
    dimensions: int | None = None
    """Length that the vectors are cut to."""
    prompt_tokens: int = 0
    """Tokens at the beginning of each text that are not pooled."""
    priority: int = 0


class LoadAdapter(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Read an adapter's weights; answered by one `AdapterLoaded` or `AdapterFailed`."""

    id: int
    config_file: str
    weights_file: str
    max_rank: int
    digest: str | None = None
    """Of the files as they were read before; where they have changed since, they are refused."""


class UnloadAdapter(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Free an adapter's weights, unless they were loaded once more since; requests that still use them end."""

    digest: str
    last_load: int
    """The id of the newest `LoadAdapter` of these weights whose answer the API process had read."""


class Cancel(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Stop generating within a token, or embedding within a pass; unknown ids are ignored."""

    id: int


class Shutdown(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Cancel all requests and exit."""


class Loading(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """How far the load has come."""

    stage: str
    bytes_done: int | None = None
    bytes_total: int | None = None
    """Of this stage, as far as it is known."""


class Logged(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """A line for the service's log: what a load found out about the model, or what may surprise its users."""

    level: int
    """Of Python's logging."""
    line: str


class Ready(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The model is loaded and has generated its first token."""

    tokenizer_folder: str
    runner: str
    """Which runner serves the model: batching or serial."""
    slots: int
    """Requests that run at once."""
    revision: str | None
    device: str
    dtype: str
    context_length: int
    vocab_size: int
    parameters: int
    unsupported: tuple[str, ...] = ()
    """Fields of `SamplingParams` that this runner cannot honour; a request that sets one is refused."""
    recommended: tuple[tuple[str, float], ...] = ()
    """Sampling settings that the model's own files recommend, by the names of `SamplingParams`."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion by the model's own files."""
    rules: str | None = None
    """Digest of what the model's own files say of single tokens; None where that is nothing."""
    logprob_shift: float | None = None
    """By how much quantization changes log-probabilities, on average; None where there is none."""
    compiled: Compiled | None = None
    """Operators compiled for this machine."""
    step_times: tuple[StepTimes, ...] = ()
    """What steps of the model take in each way of execution; empty where nothing was measured."""
    folder: str | None = None
    """Where its files are."""
    device_bytes: int | None = None
    """Memory that it takes on a GPU, the KV cache included."""
    device_total_bytes: int | None = None
    """Memory of that GPU."""
    embedding: EmbeddingInfo | None = None
    """How it embeds texts; None: not at all."""


class AdapterLoaded(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """An adapter's weights are in memory."""

    id: int
    digest: str
    """Of everything that decides what it computes; requests name it by this."""
    rank: int
    parameters: int
    base: str | None
    """The model that its configuration says it was made for; nothing follows from that."""


class AdapterFailed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """An adapter cannot be used with this model; the message is one line for whoever loads it."""

    id: int
    message: str


LoadFailure = Literal["not_found", "gated", "unreachable", "unsupported", "bad_file", "no_memory", "failed"]


class LoadFailed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The model cannot be loaded; the worker waits to be killed."""

    message: str
    reason: LoadFailure = "failed"
    needed_bytes: int | None = None
    free_bytes: int | None = None
    """Of memory, where it lacks."""


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """The progress of one request in one step.

    The first event of a request is empty: its prefill starts.  The last, and only the last, has `finish` or `error`.
    `stop` means that the model sampled an end token, which is counted but not listed, or that the request's grammar
    allows nothing more: there is no end token then.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    finish: Literal["stop", "length", "abort"] | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids` where the request wants them, and one for the end token where it wants those of the
    prompt too: whoever scores a text counts tokens."""
    cached_tokens: int = 0
    """Prompt tokens that were in the KV cache already; in the first event only."""
    end_token: int | None = None
    """The end token that the model sampled; None where the completion did not end with one."""
    invalid: bool = False
    """With `error`: whether the request is at fault and would fail again."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the next tokens of the prompt where the request wants them, from its second token on; all come before the
    first of `token_ids`."""


class Step(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The events of one step of the model, for all requests in it."""

    events: list[TokenEvent]
    seconds: tuple[float, ...] = ()
    """How long this step took, and before it those since the last message, which had no events."""
    preempted: int = 0
    """Requests that lost their row of the KV cache in these steps, to go on later."""


class Embedded(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The vectors of some texts of a request; a `TokenEvent` without tokens says when it begins and when it ends."""

    id: int
    positions: tuple[int, ...]
    """Which of the request's texts."""
    vectors: tuple[bytes, ...]
    """For each the numbers as little-endian float32."""


Exchange = Callable[[list[TokenEvent]], None]
"""Sends the events of a step and handles the messages that arrived; may call the runner's `submit` and `cancel`."""

ToWorker = Submit | Embed | LoadAdapter | UnloadAdapter | Cancel | Shutdown
FromWorker = Loading | Logged | Ready | LoadFailed | AdapterLoaded | AdapterFailed | Step | Embedded

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder[ToWorker](ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder[FromWorker](FromWorker).decode
