"""A model folder whose files say what is not so is refused in one line that names the file and the field, or served."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from app.ipc.messages import Logged, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.serial.serial_runner import SerialRunner
from app.worker.loaded_model import LoadedModel
from app.worker.loading.load_failure import load_failure
from app.worker.loading.load_log import LoadLog
from app.worker.loading.loader import load
from app.worker.loading.model_files import JSON_BYTES, LoadError
from app.worker.loading.stage_deadline import within_deadline
from app.worker.process import make_runner
from app.worker.sampling.sampler import NO_TOKEN, NO_TOKEN_LEFT
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.lying_models import (
    Damage,
    Weights,
    add_weights,
    all_of,
    change_json,
    change_weights,
    drop_weights,
    eight_bits_without_scales,
    fill_weights,
    lying_llama,
    rename_weights,
    save_overflowing_gpt2,
    write,
)
from tests.unit.tiny_models import chatml_tokenizer, save_tiny_llama
from tests.unit.worker.families import FAMILIES, NOT_BATCHABLE, make
from tests.unit.worker.test_loader import SPEC
from tests.waiting import START_SECONDS


def config(*removed: str, **changes: Any) -> Damage:
    return change_json("config.json", changes, *removed)


def generation(**changes: Any) -> Damage:
    return change_json("generation_config.json", changes)


def cut_vocabulary(*names: str) -> Damage:
    """Keep the first 100 rows of these matrices."""
    return change_weights(lambda weights: {k: v[:100] if k in names else v for k, v in weights.items()})


def truncate(size: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def index(file: str) -> Damage:
    """Put the weights in another file, and name `file` in an index."""

    def damage(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder.parent / "outside.safetensors").write_bytes((folder / "shard.safetensors").read_bytes())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return damage


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def sparse(name: str) -> Damage:
    """Make a file of more bytes than are read, which takes no space."""

    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(JSON_BYTES + 1)

    return damage


def backtrack(folder: Path) -> None:
    """Give the tokenizer an expression that tries every way to part a run of letters."""
    tokenizer: PreTrainedTokenizerFast = chatml_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(\w+)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def latin(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a": "\xe9"}')


def corrupt(path: Path) -> None:
    path.write_bytes(b"\xe9\xff")


def pad(folder: Path) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    path.write_text(json.dumps(spec | {"padding": padding | {"pad_to_multiple_of": None}}))


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def empty_head(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}


def overflowing_head(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": torch.full_like(weights["lm_head.weight"], 3e38)}


REFUSED: dict[str, tuple[Damage, str]] = {
    "no head": (drop_weights("lm_head"), r"the weights lack lm_head\.weight"),
    "no part of a layer": (
        drop_weights("layers.1.mlp"),
        r"the weights lack model\.layers\.1\.mlp\.down_proj\.weight, ",
    ),
    "more layers": (config(num_hidden_layers=3), r"config\.json: num_hidden_layers is 3, but the weights hold 2"),
    "a million layers": (config(num_hidden_layers=10**6), r"config\.json: num_hidden_layers is 1000000"),
    "labels": (config(num_labels=10**7), r"config\.json: num_labels must be a whole number up to"),
    "fewer layers": (
        config(num_hidden_layers=1),
        r"the weights hold model\.layers\.1\..* and 6 more, which .* not use",
    ),
    "prefixed": (
        rename_weights("", "base_model.model."),
        r"the weights lack .* and 18 more; they hold base_model\.model\.lm_head\.weight, .* instead",
    ),
    "quantized without scales": (
        change_weights(eight_bits_without_scales),
        r"model\.safetensors: model\.layers\.0\.mlp\.down_proj\.weight is stored as F8_E4M3, but config\.json has no",
    ),
    "unused bias": (
        add_weights(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        r"the weights hold model\.layers\.0\.self_attn\.q_proj\.bias, which",
    ),
    "unknown method": (
        config(quantization_config={"quant_method": "modelopt"}),
        r"config\.json: quantization_config\.quant_method is 'modelopt', which is not supported",
    ),
    "no method": (
        config(quantization_config={"bits": 4}),
        r"config\.json: quantization_config\.quant_method must name",
    ),
    "method a list": (config(quantization_config=[1]), r"config\.json: quantization_config holds no object but a list"),
    "shapes": (
        config(intermediate_size=65),
        r"down_proj\.weight is 32 x 64 in the weights, but 32 x 65 by config\.json",
    ),
    "layers too wide": (
        config(intermediate_size=10**9),
        r"config\.json: describes a model of \d[\d,]{9,} parameters, but the weights hold [\d,]+ numbers",
    ),
    "head too small": (
        cut_vocabulary("lm_head.weight"),
        r"lm_head\.weight is 100 x 32 .*, but 281 x 32 by config\.json",
    ),
    "vocabulary too small": (
        all_of(cut_vocabulary("lm_head.weight", "model.embed_tokens.weight"), config(vocab_size=100)),
        r"tokenizer\.json: ordinary text needs token \d+, but vocab_size of config\.json is 100",
    ),
    "NaN in a layer": (
        fill_weights("layers.1.mlp.up", float("nan")),
        r"not finite in model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "infinity in a row": (fill_weights("embed_tokens", float("inf")), r"not finite in model\.embed_tokens\.weight"),
    "scores not finite": (change_weights(overflowing_head), r"the model's scores are not finite"),
    "scores equal": (change_weights(empty_head), r"the model's scores are equal for all tokens"),
    "eps NaN": (config(rms_norm_eps=float("nan")), r"config\.json: rms_norm_eps is not a finite number"),
    "eps text": (config(rms_norm_eps="small"), r"config\.json: .*'rms_norm_eps'"),
    "context 1": (config(max_position_embeddings=1), r"config\.json: max_position_embeddings is 1; "),
    "context 0": (config(max_position_embeddings=0), r"config\.json: max_position_embeddings must be a whole number"),
    "context text": (config(max_position_embeddings="many"), r"config\.json: max_position_embeddings must be a whole"),
    "no heads": (config(num_attention_heads=0), r"config\.json: num_attention_heads must be a whole number above 0"),
    "odd heads": (config(num_attention_heads=3), r"config\.json: .*attention heads"),
    "huge": (config(hidden_size=2**40), r"config\.json: describes a model of \d[\d,]+ parameters"),
    "architectures a text": (config(architectures="LlamaForCausalLM"), r"config\.json: architectures must be a list"),
    "no type": (config("model_type"), r"config\.json: model_type must name"),
    "code": (config(model_type="none_such", auto_map={"AutoConfig": "x.Y"}), r"config\.json: .*code of its own"),
    "config no JSON": (write("config.json", "{nope"), r"config\.json: is not valid JSON \(.* in line 1, column 2\)"),
    "config a list": (write("config.json", "[1]"), r"config\.json: holds no object but a list"),
    "config null": (write("config.json", "null"), r"config\.json: holds no object but null"),
    "config nested": (write("config.json", '{"a":' * 10**5), r"config\.json: is nested too deeply"),
    "config digits": (
        write("config.json", '{"a":' + "1" * 10**4 + "}"),
        r"config\.json: holds a number that is too long",
    ),
    "config Latin": (
        latin,
        r"is not UTF-8 text",
    ),
    "config huge": (sparse("config.json"), r"config\.json: has 67108865 bytes; at most"),
    "temperature a text": (generation(temperature="hot"), r"generation_config\.json: temperature must be a number"),
    "temperature NaN": (generation(temperature=float("nan")), r"generation_config\.json: temperature is not a finite"),
    "end a text": (generation(eos_token_id="</s>"), r"generation_config\.json: eos_token_id must be a token id"),
    "end a boolean": (generation(eos_token_id=True), r"generation_config\.json: .*"),
    "generation a list": (
        write("generation_config.json", "[]"),
        r"generation_config\.json: holds no object but a list",
    ),
    "generation no JSON": (write("generation_config.json", "{"), r"generation_config\.json: is not valid JSON"),
    "no tokenizer": (remove("tokenizer.json"), r"it has no tokenizer\.json"),
    "tokenizer no JSON": (write("tokenizer.json", "{"), r"tokenizer\.json: cannot be read"),
    "tokenizer a list": (write("tokenizer.json", "[]"), r"tokenizer\.json: cannot be read"),
    "tokenizer empty": (write("tokenizer.json", "{}"), r"tokenizer\.json: cannot be read"),
    "tokenizer configuration": (write("tokenizer_config.json", "["), r"tokenizer_config\.json: is not valid JSON"),
    "tokenizer code": (
        change_json("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"}),
        r"tokenizer_config\.json: it needs Python code of its own",
    ),
    "template Latin": (
        lambda folder: corrupt(folder / "chat_template.jinja"),
        r"chat_template\.jinja: is not UTF-8 text",
    ),
    "template long": (write("chat_template.jinja", "x" * 2**21), r"chat_template\.jinja: is not a file of at most"),
    "template a number": (
        change_json("tokenizer_config.json", {"chat_template": 5}),
        r"tokenizer_config\.json: chat_template must be a text",
    ),
    "template without a text": (
        change_json("tokenizer_config.json", {"chat_template": [{"name": 1}]}),
        r"tokenizer_config\.json: chat_template must be a text",
    ),
    "token a number": (
        change_json("tokenizer_config.json", {"eos_token": 5}),
        r"tokenizer_config\.json: eos_token must be a text",
    ),
    "token of nothing": (
        change_json("tokenizer_config.json", {"eos_token": "<none>"}),
        r"tokenizer_config\.json: eos_token names no token that the model has",
    ),
    "length a text": (
        change_json("tokenizer_config.json", {"model_max_length": "x"}),
        r"tokenizer_config\.json: model_max_length must be a number",
    ),
    "integers": (
        change_weights(lambda w: {k: v.to(torch.int8) if "up_proj" in k else v for k, v in w.items()}),
        r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight is stored as I8, but config\.json has no quant",
    ),
    "expression": (backtrack, r"tokenizer\.json: its expressions take too long to split 41 characters"),
    "weights cut": (truncate(-1000), r"model\.safetensors: is damaged or incomplete"),
    "weights cut in the header": (truncate(5), r"model\.safetensors: is damaged or incomplete"),
    "index outside": (
        index("../outside.safetensors"),
        r"model\.safetensors\.index\.json: weight_map names a file outside",
    ),
    "index absolute": (index("/etc/passwd"), r"model\.safetensors\.index\.json: weight_map names a file outside"),
    "index missing": (
        index("gone.safetensors"),
        r"index\.json: weight_map names gone\.safetensors, which is not there",
    ),
    "index pickle": (index("shard.bin"), r"model\.safetensors\.index\.json: .*none in the safetensors format"),
    "index a list": (
        all_of(index("shard.safetensors"), write("model.safetensors.index.json", "[]")),
        r"model\.safetensors\.index\.json: holds no object but a list",
    ),
    "index empty": (
        all_of(index("shard.safetensors"), write("model.safetensors.index.json", "{}")),
        r"model\.safetensors\.index\.json: weight_map must be an object",
    ),
    "no index": (
        all_of(index("shard.safetensors"), remove("model.safetensors.index.json")),
        r"it has neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "pickled": (
        pickle,
        "safetensors",
    ),
}


def load_folder(folder: Path, **changes: Any) -> LoadedModel:
    spec = msgspec.structs.replace(SPEC, name=str(folder), **changes)
    return load(spec, str(folder / "saved"), on_stage=lambda stage: None)


@pytest.mark.parametrize(("damage", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_lie_is_refused_in_one_line(tmp_path: Path, damage: Damage, reason: str):
    """It names the file and the field, or the tensors, and is known for what it is: no traceback belongs to it."""
    folder = lying_llama(tmp_path / "model", damage)
    started = time.monotonic()

    with pytest.raises(LoadError, match=reason) as refusal:
        load_folder(folder)

    message = load_failure(refusal.value).message
    assert "\n" not in message
    assert len(message) < 700
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("layers", "reason"),
    [(0, "n_layer must be a whole number above 0"), (1000, "n_layer is 1000, but the weights hold 1")],
)
def test_layers_are_counted_by_the_name_that_the_family_gives_them(tmp_path: Path, layers: int, reason: str):
    """Before any of them is built, and a model is not served without."""
    folder = save_overflowing_gpt2(tmp_path / "model", "hello")
    change_json("config.json", {"n_layer": layers})(folder)

    with pytest.raises(LoadError, match=reason):
        load_folder(folder)


def test_a_reason_ends_with_one_full_stop():
    """Some are sentences of another part."""
    assert load_failure(LoadError("its first token failed: The model failed.")).message.endswith("The model failed.")


BUILDS = FAMILIES | {name: build for name, (build, _) in NOT_BATCHABLE.items()}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_sound_model_of_any_family_passes_every_check(
    tmp_path: Path, build: Callable[[], Any], caplog: pytest.LogCaptureFixture
):
    """Tied weights, renamed tensors, experts and recurrent states are no lies."""
    model = make(build)
    tokenizer = chatml_tokenizer()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    assert len(tokenizer) == load_folder(tmp_path).vocab_size
    assert "which this model does not use" not in caplog.text


SERVED: dict[str, tuple[Damage, str]] = {
    "padding": (pad, ""),
    "unused head": (add_weights(score__weight=torch.ones(2, 32)), "the weights hold score.weight, which this model"),
    "old buffer": (
        add_weights(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        "",
    ),
    "old mask": (add_weights(model__layers__0__self_attn__bias=torch.ones(1, 1, 4, 4)), "self_attn.bias, which"),
    "top_k": (generation(top_k=2**70), "generation_config.json: top_k is not from 0 to"),
    "temperature": (generation(temperature=9.5), "generation_config.json: temperature is not from 0 to 2"),
    "end outside": (generation(eos_token_id=[5, 10**6, -1]), "generation_config.json: eos_token_id names tokens"),
    "context": (config(max_position_embeddings=10**9), "config.json: a request of 1000000000 tokens does not fit"),
    "results without names": (config(return_dict=False), ""),
    "code beside a known type": (config(auto_map={"AutoModelForCausalLM": "trap.Model"}), ""),
    "tokenizer too large": (
        all_of(
            change_weights(lambda w: {k: v[:280] if v.shape[0] == 281 else v for k, v in w.items()}),
            config(vocab_size=280),
        ),
        "tokenizer.json has 281 tokens and the model 280",
    ),
}


@pytest.mark.parametrize(("damage", "warning"), SERVED.values(), ids=SERVED)
def test_what_does_no_harm_is_served_with_a_warning(
    tmp_path: Path, damage: Damage, warning: str, caplog: pytest.LogCaptureFixture
):
    """The model answers, and what its users may miss stands in the log in one line."""
    folder = lying_llama(tmp_path / "model", damage)
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    runner = make_runner(load_folder(folder), SPEC)

    assert isinstance(runner, BatchingRunner)
    assert all(event.error is None for event in answer(runner, SamplingParams(max_tokens=3)))
    assert 2 < runner.context_length < 10**8
    assert warning in caplog.text
    assert not (tmp_path / "sprung").exists()


def answer(runner: BatchingRunner | SerialRunner, *params: SamplingParams, prompt: int = 7) -> list[TokenEvent]:
    """Run requests at once; the first has another prompt than the rest."""
    events: list[TokenEvent] = []
    for number, each in enumerate(params):
        runner.submit(Submit(id=number, prompt_ids=(prompt if not number else 9, 8), params=each))
    while runner.busy:
        runner.step(events.extend)
    return events


@pytest.mark.parametrize("compile_setting", ["none", "auto"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=4),
        SamplingParams(max_tokens=4, temperature=1.0),
        SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1),
        SamplingParams(max_tokens=4, logprobs=2, presence_penalty=1.0),
    ],
    ids=["greedy", "sampled", "sorted", "scored"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_scores_that_are_not_finite_fails_by_itself(
    tmp_path: Path, compile_setting: Any, params: SamplingParams, value: float
):
    """Its neighbours in the batch get the tokens that they get without it, and so does the next request."""
    loaded = load_folder(save_tiny_llama(tmp_path / "model"))
    runner = make_runner(loaded, msgspec.structs.replace(SPEC, compile=compile_setting))
    assert isinstance(runner, BatchingRunner)
    seeded = replace(params, seed=5)
    single = tokens_of(answer(runner, seeded, prompt=9), 0)
    spoil(loaded, 7, value)

    events = answer(runner, params, seeded, seeded)

    assert [NO_TOKEN.reason] == [event.error for event in events if event.error]
    assert [0] == [event.id for event in events if event.error]
    assert single == tokens_of(events, 1) == tokens_of(events, 2)
    assert single == tokens_of(answer(runner, seeded, prompt=9), 0)


def test_settings_that_leave_no_token_are_the_requests_fault(tmp_path: Path):
    """Not the model's, whose scores are finite; its neighbour is answered."""
    folder = save_tiny_llama(tmp_path / "model", vocab_size=281, eos_token_id=[0, 1])
    runner = make_runner(load_folder(folder), SPEC)
    assert isinstance(runner, BatchingRunner)
    nothing = SamplingParams(max_tokens=2, min_tokens=1, stop_token_ids=tuple(range(281)))

    events = answer(runner, nothing, SamplingParams(max_tokens=2))

    assert [(0, NO_TOKEN_LEFT.reason, True)] == [(e.id, e.error, e.invalid) for e in events if e.error]
    assert tokens_of(events, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_serial_runner_says_the_same_of_scores_that_are_not_finite(
    tmp_path: Path, temperature: float, value: float
):
    """One request at a time: the one fails, the next is answered."""
    loaded = load_folder(save_tiny_llama(tmp_path / "model"))
    runner = SerialRunner(loaded)
    spoil(loaded, 7, value)
    params = SamplingParams(max_tokens=4, temperature=temperature, seed=3)

    events = answer(runner, params, params)

    assert [(0, NO_TOKEN.reason)] == [(event.id, event.error) for event in events if event.error]
    assert tokens_of(events, 1)


def spoil(loaded: LoadedModel, token: int, value: float) -> None:
    """Put a number that is none into the embedding of one token; every score after it is spoilt."""
    model: Any = loaded.pipeline.model
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value


def tokens_of(events: list[TokenEvent], number: int) -> list[int]:
    return [token for event in events if event.id == number for token in event.token_ids]


def test_names_in_the_files_write_no_lines_and_no_colours(tmp_path: Path):
    """A tensor may be called anything; the log has one line of plain signs."""
    folder = lying_llama(tmp_path / "model", rename_weights("model.", "x\n\x1b[31mmodel is ready\r."))

    with pytest.raises(LoadError) as refusal:
        load_folder(folder)

    message = load_failure(refusal.value).message
    assert "x ?[31mmodel is ready" in message
    assert message.isprintable()


def test_a_stage_that_does_not_end_is_named():
    """The load fails after the deadline, and does not wait for the stage."""
    started = time.monotonic()
    with pytest.raises(LoadError, match=r"its tokenizer could not be read within 0\.2 s"):
        within_deadline("tokenizer", lambda: time.sleep(60), 0.2)

    assert time.monotonic() - started < 30


def test_what_a_stage_raises_and_returns_is_its_callers():
    """In the same thread's hands as without a deadline."""
    with pytest.raises(ZeroDivisionError):
        within_deadline("tokenizer", lambda: 1 // len(""))
    assert 7 == within_deadline("tokenizer", lambda: 7)


def test_a_stage_that_keeps_the_interpreters_lock_ends_the_process():
    """Nothing in Python can stop it; the system does, and its parent sees which signal it was."""
    code = (
        "import re; from app.worker.loading.stage_deadline import within_deadline\n"
        "within_deadline('tokenizer', lambda: re.match(r'(a+)+$', 'a' * 60 + 'b'), 0.2)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=START_SECONDS, check=False)

    assert -signal.SIGVTALRM == done.returncode


def test_what_a_load_warns_of_or_says_itself_are_lines_of_the_parents_log():
    """Each is one line, once; of libraries only warnings.  Afterwards they go where they went before."""
    lines: list[Logged] = []
    before, level = logging.getLogger().handlers[:], logging.getLogger("app").level
    noisy = logging.getLogger("noisy_library")
    noisy.setLevel(logging.INFO)
    with LoadLog() as warnings:
        for _ in range(3):
            logging.getLogger("transformers.modeling_utils").warning("first\n  second %s", "third")
        logging.getLogger("app.worker").warning("x" * 10_000)
        logging.getLogger("app.worker.execution").info("measured %d ways", 3)
        logging.getLogger("app.worker").debug("never mind")
        logging.getLogger("transformers").info("never mind")
        noisy.info("a text of a user")
        warnings.flush_to(lines.append)
        warnings.flush_to(lines.append)

    assert lines == [
        Logged(logging.WARNING, "first second third"),
        Logged(logging.WARNING, "x" * 500),
        Logged(logging.INFO, "measured 3 ways"),
    ]
    assert (before, level) == (logging.getLogger().handlers, logging.getLogger("app").level)
