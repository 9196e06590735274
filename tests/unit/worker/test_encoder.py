"""Encoders from their folders: vectors are those of transformers' own forward pass, pooled as the files say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from app.ipc.messages import Embed, Embedded, ModelSpec, TokenEvent
from app.worker.embedding.embedding_runner import EmbeddingRunner
from app.worker.embedding.encoder import LoadedEncoder, load_encoder
from app.worker.loading.model_files import LoadError
from tests.unit.tiny_encoders import (
    MAX_TOKENS,
    POSITIONS,
    SIZE,
    save_tiny_bert,
    save_tiny_encoder,
    wordpiece_tokenizer,
    write,
)

SPEC = ModelSpec(
    name="", source="local", device="cpu", dtype="float32", revision=None, max_model_len=None, threads=0, task="embed"
)
TEXTS = (
    "The cat sat.",
    "a",
    " ",
    "the old red house by the sea and a dog ran to Paris",
    "zebra [SEP] [MASK]",
    "ünï 中文",
)
TOLERANCE = 1e-5


def load(folder: Path, **changes: Any) -> LoadedEncoder:
    from msgspec import structs

    spec = structs.replace(SPEC, name=str(folder), **changes)
    return load_encoder(spec, str(folder.parent / f"{folder.name}-tokenizer"), lambda stage: None)


def vectors_of(encoder: LoadedEncoder, inputs: list[list[int]], **fields: Any) -> Tensor:
    """Embed in small passes, so that texts of several lengths are padded."""
    runner = EmbeddingRunner(encoder, 40)
    found: dict[int, Tensor] = {}

    def report(embedded: list[Embedded], events: list[TokenEvent]) -> None:
        for message in embedded:
            for place, vector in zip(message.positions, message.vectors, strict=True):
                found[place] = torch.frombuffer(bytearray(vector), dtype=torch.float32)
        assert not [event.error for event in events if event.error]

    runner.submit(Embed(1, tuple(map(tuple, inputs)), **fields))
    while runner.busy:
        runner.step(report)
    return torch.stack([found[place] for place in range(len(inputs))])


def ids_of(folder: Path, texts: tuple[str, ...] = TEXTS, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [list(tokenizer(text, truncation=True, max_length=max_tokens).input_ids) for text in texts]


@torch.inference_mode()
def expected(
    folder: Path, inputs: list[list[int]], pool: Callable[[Tensor], Tensor], *, normalize: bool = True
) -> Tensor:
    """Return transformers' own states of each text by itself, pooled by a function of the test."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    pooled = [pool(model(input_ids=torch.tensor([ids])).last_hidden_state[0]) for ids in inputs]
    return torch.stack([vector / vector.norm() if normalize else vector for vector in pooled])


POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "pooling_mode_cls_token": lambda states: states[0],
    "pooling_mode_mean_tokens": lambda states: states.mean(dim=0),
    "pooling_mode_max_tokens": lambda states: states.amax(dim=0),
    "pooling_mode_lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLS)
def test_vectors_are_the_models_own_states_pooled_as_the_files_say(mode: str, normalize: bool, tmp_path: Path):
    folder = save_tiny_encoder(tmp_path / "m", pooling={mode: True}, normalize=normalize)
    encoder, inputs = load(folder), ids_of(folder)
    ours = vectors_of(encoder, inputs)

    assert (normalize, SIZE, MAX_TOKENS) == (encoder.info.normalized, encoder.info.dimension, encoder.info.max_tokens)
    torch.testing.assert_close(
        ours, expected(folder, inputs, POOLS[mode], normalize=normalize), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_the_newer_name_of_the_pooling_is_read_too(tmp_path: Path):
    folder = save_tiny_encoder(tmp_path / "m", pooling={"embedding_dimension": SIZE, "pooling_mode": "cls"})
    inputs = ids_of(folder)
    ours = vectors_of(load(folder), inputs)
    torch.testing.assert_close(ours, expected(folder, inputs, lambda states: states[0]), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_projection_follows_the_pooling(tmp_path: Path):
    from safetensors.torch import load_file

    dense = {"in_features": SIZE, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.Tanh"}
    folder = save_tiny_encoder(tmp_path / "m", dense=dense)
    weights = load_file(folder / "2_Dense/model.safetensors")
    encoder, inputs = load(folder), ids_of(folder)

    def pool(states: Tensor) -> Tensor:
        return torch.tanh(weights["linear.weight"] @ states.mean(dim=0) + weights["linear.bias"])

    assert 8 == encoder.info.dimension
    torch.testing.assert_close(
        vectors_of(encoder, inputs), expected(folder, inputs, pool), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_a_plain_model_gives_the_mean_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = save_tiny_bert(tmp_path / "m")
    encoder, inputs = load(folder), ids_of(folder, max_tokens=POSITIONS)

    assert (("mean",), False, POSITIONS) == (encoder.info.pooling, encoder.info.normalized, encoder.info.max_tokens)
    assert "no modules.json: its vectors are the mean of its tokens'" in caplog.text
    ours = expected(folder, inputs, lambda states: states.mean(dim=0), normalize=False)
    torch.testing.assert_close(vectors_of(encoder, inputs), ours, atol=TOLERANCE, rtol=TOLERANCE)


def _families() -> Mapping[str, Callable[[dict[str, Any]], Any]]:
    import transformers as t

    short: dict[str, Any] = {"vocab_size": None, "dim": SIZE, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    decoder: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    modern: dict[str, Any] = {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {
        "roberta": lambda base: t.RobertaModel(t.RobertaConfig(**base, pad_token_id=0)),
        "masked bert": lambda base: t.BertForMaskedLM(t.BertConfig(**base)),
        "distilbert": lambda base: t.DistilBertModel(t.DistilBertConfig(**short | {"vocab_size": base["vocab_size"]})),
        "mpnet": lambda base: t.MPNetModel(t.MPNetConfig(**base, pad_token_id=0)),
        "modernbert": lambda base: t.ModernBertModel(t.ModernBertConfig(**base | modern)),
        "decoder": lambda base: t.Qwen3ForCausalLM(t.Qwen3Config(**base, **decoder)),
    }


@pytest.mark.parametrize("family", ["roberta", "masked bert", "distilbert", "mpnet", "modernbert", "decoder"])
def test_padding_changes_no_vector_of_any_family(family: str, tmp_path: Path):
    folder = save_tiny_encoder(tmp_path / "m", pooling={"pooling_mode": "lasttoken"})
    base: dict[str, Any] = {"vocab_size": len(wordpiece_tokenizer()), "hidden_size": SIZE, "intermediate_size": 64}
    base |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    torch.manual_seed(3)
    (folder / "model.safetensors").unlink()
    _families()[family](base).save_pretrained(folder)
    inputs = ids_of(folder)

    ours = vectors_of(load(folder), inputs)
    torch.testing.assert_close(
        ours, expected(folder, inputs, lambda states: states[-1]), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_the_encoder_of_t5_needs_no_decoder(tmp_path: Path):
    from transformers import T5Config, T5EncoderModel

    folder = save_tiny_encoder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    config = T5Config(vocab_size=len(wordpiece_tokenizer()), d_model=SIZE, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    inputs = ids_of(folder)
    with torch.inference_mode():
        model = T5EncoderModel.from_pretrained(folder)
        single = [model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in inputs]
    torch.testing.assert_close(
        vectors_of(load(folder), inputs),
        torch.stack([vector / vector.norm() for vector in single]),
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


def test_a_prompt_that_is_not_pooled_is_read_and_left_out(tmp_path: Path):
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    folder = save_tiny_encoder(tmp_path / "m", pooling=pooling)
    encoder = load(folder)
    inputs = ids_of(folder, ("query: the cat sat", "query: a dog"))
    before = 1 + len(AutoTokenizer.from_pretrained(folder)("query: ", add_special_tokens=False).input_ids)

    assert not encoder.info.pools_prompt
    torch.testing.assert_close(
        vectors_of(encoder, inputs, prompt_tokens=before),
        expected(folder, inputs, lambda states: states[before:].mean(dim=0)),
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


def test_a_text_of_nothing_but_its_prompt_has_a_vector(tmp_path: Path):
    encoder = load(save_tiny_encoder(tmp_path / "m"))
    assert vectors_of(encoder, [[2, 7, 3]], prompt_tokens=3).isfinite().all()


def test_lowercase_of_the_files_reaches_the_tokenizer_of_the_parent(tmp_path: Path):
    folder = save_tiny_encoder(tmp_path / "m", lowercase=True, tokenizer=wordpiece_tokenizer(lowercase=False))
    load(folder)
    saved = AutoTokenizer.from_pretrained(tmp_path / "m-tokenizer")
    assert saved("Paris").input_ids == saved("paris").input_ids


@pytest.mark.parametrize(
    ("named", "tokenizer_length", "limit", "expected_tokens"),
    [
        (None, None, None, POSITIONS),
        (None, 20, None, 20),
        (30, 20, None, 30),
        (30, None, 10, 10),
        (9999, None, None, POSITIONS),
    ],
)
def test_the_longest_text_is_what_files_model_and_settings_allow(
    named: int | None, tokenizer_length: int | None, limit: int | None, expected_tokens: int, tmp_path: Path
):
    settings = {} if tokenizer_length is None else {"model_max_length": tokenizer_length}
    folder = save_tiny_encoder(tmp_path / "m", max_tokens=named, tokenizer=wordpiece_tokenizer(**settings))
    encoder = load(folder, max_model_len=limit)
    assert expected_tokens == encoder.info.max_tokens
    assert vectors_of(encoder, [[2] * expected_tokens]).isfinite().all()


def test_positions_that_begin_behind_the_paddings_are_not_all_usable(tmp_path: Path):
    """As RoBERTa's, of whose 514 positions a text can have 512."""
    from transformers import RobertaConfig, RobertaModel

    folder = save_tiny_encoder(tmp_path / "m", max_tokens=None)
    (folder / "model.safetensors").unlink()
    base: dict[str, Any] = {"vocab_size": 200, "hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 1}
    config = RobertaConfig(**base, num_attention_heads=4, max_position_embeddings=POSITIONS, pad_token_id=1)
    RobertaModel(config).save_pretrained(folder)
    encoder = load(folder)
    assert POSITIONS - 2 == encoder.info.max_tokens
    assert vectors_of(encoder, [[5] * encoder.info.max_tokens]).isfinite().all()


@pytest.mark.parametrize(
    ("setting", "config", "dimensions"),
    [
        (None, {}, None),
        (True, {}, ()),
        (None, {"is_matryoshka": True}, ()),
        (None, {"matryoshka_dimensions": [16, 8]}, (8, 16)),
        (False, {"is_matryoshka": True}, None),
    ],
)
def test_vectors_may_be_cut_where_settings_or_files_say_so(
    setting: bool | None, config: dict[str, Any], dimensions: tuple[int, ...] | None, tmp_path: Path
):
    folder = save_tiny_encoder(tmp_path / "m", **config)
    assert dimensions == load(folder, matryoshka=setting).info.dimensions


BROKEN: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "no modules": (lambda folder: write(folder / "modules.json", []), "names no module"),
    "an object": (lambda folder: write(folder / "modules.json", {}), "holds no list of objects"),
    "another first": (
        lambda folder: write(folder / "modules.json", [{"path": "", "type": "x.WordEmbeddings"}]),
        "the first module is WordEmbeddings; only Transformer is supported",
    ),
    "an unknown module": (
        lambda folder: write(
            folder / "modules.json", [{"path": "", "type": "Transformer"}, {"path": "", "type": "CNN"}]
        ),
        "the module CNN is not supported there",
    ),
    "no pooling": (
        lambda folder: write(folder / "modules.json", [{"path": "", "type": "Transformer"}]),
        "there is no module Pooling",
    ),
    "a path outside": (
        lambda folder: write(folder / "modules.json", [{"path": "../..", "type": "Transformer"}]),
        "names a path outside of the folder",
    ),
    "an unknown pooling": (
        lambda folder: write(folder / "1_Pooling/config.json", {"pooling_mode": "median"}),
        "pooling_mode must be one of cls, max, mean",
    ),
    "no pooling file": (lambda folder: (folder / "1_Pooling/config.json").unlink(), "config.json: cannot be read"),
    "a length that is none": (
        lambda folder: write(folder / "sentence_bert_config.json", {"max_seq_length": 0}),
        "max_seq_length must be a whole number above 0",
    ),
    "prompts that are none": (
        lambda folder: write(folder / "config_sentence_transformers.json", {"prompts": {"query": 1}}),
        "prompts must be texts",
    ),
    "no such default": (
        lambda folder: write(folder / "config_sentence_transformers.json", {"default_prompt_name": "x"}),
        "default_prompt_name is the name of no prompt",
    ),
    "a cross encoder": (
        lambda folder: write(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder"}),
        "model_type must be SentenceTransformer",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights in the safetensors format"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_served_is_refused_by_file_and_field(case: str, tmp_path: Path):
    folder = save_tiny_encoder(tmp_path / "m")
    spoil, message = BROKEN[case]
    spoil(folder)
    with pytest.raises(LoadError, match=message.replace("(", r"\(")):
        load(folder)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"activation_function": "evil.Module"}, "activation_function must be one of"),
        ({"module_input_name": "token_embeddings"}, "Dense is only supported behind Pooling"),
        ({"use_residual": True}, "use_residual needs as many outputs as inputs"),
        ({"in_features": 7}, "it was loaded, but cannot embed a text"),
    ],
)
def test_a_projection_that_is_not_supported_is_refused(dense: dict[str, Any], message: str, tmp_path: Path):
    config = {"in_features": SIZE, "out_features": 8, "bias": False, **dense}
    with pytest.raises(LoadError, match=message):
        load(save_tiny_encoder(tmp_path / "m", dense=config))


def test_pickled_weights_of_a_projection_are_not_read(tmp_path: Path):
    dense = {"in_features": SIZE, "out_features": 8, "bias": False}
    folder = save_tiny_encoder(tmp_path / "m", dense=dense)
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(LoadError, match="2_Dense: has no weights in the safetensors format, and no other is read"):
        load(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_encoder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="not finite"):
        load(folder)
