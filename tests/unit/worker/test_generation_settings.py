"""What a model's files say about generating is done as transformers does it, or said at start."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from app.ipc.messages import Submit, TokenEvent
from app.types import SamplingParams
from app.worker.loaded_model import LoadedModel
from app.worker.loading.model_files import LoadError
from app.worker.process import make_runner
from app.worker.sampling.generation_rules import NO_RULES, GenerationRules
from app.worker.sampling.sampler import Sampled, SequenceSampler, sample
from tests.unit.tiny_models import save_tiny_llama
from tests.unit.worker.test_loader import SPEC, load_folder

VOCABULARY = 12
PROMPT = (5, 6, 7, 8, 5, 6)
TOKENS = st.integers(0, VOCABULARY - 1)
IDS = st.lists(TOKENS, max_size=4).map(tuple)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=3).map(tuple)
BIASES = st.dictionaries(SEQUENCES, st.floats(-8, 8, width=16), max_size=4).map(lambda given: tuple(given.items()))
RULES = st.builds(
    GenerationRules,
    suppress_tokens=IDS,
    begin_suppress_tokens=IDS,
    bad_words_ids=st.lists(SEQUENCES, max_size=4).map(tuple),
    sequence_bias=BIASES,
    no_repeat_ngram_size=st.integers(0, 3),
)


def processors(rules: GenerationRules, prompt_tokens: int) -> LogitsProcessorList:
    """Return the same rules as transformers applies them."""
    found: list[Any] = []
    if rules.sequence_bias:
        found.append(SequenceBiasLogitsProcessor([[list(ids), float(bias)] for ids, bias in rules.sequence_bias]))
    if rules.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    if rules.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor([list(ids) for ids in rules.bad_words_ids]))
    if rules.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(rules.suppress_tokens))
    if rules.begin_suppress_tokens:
        found.append(SuppressTokensAtBeginLogitsProcessor(rules.begin_suppress_tokens, prompt_tokens))
    return LogitsProcessorList(found)


@given(RULES, st.lists(TOKENS, min_size=1, max_size=8), st.integers(0, 10_000))
def test_rules_choose_what_transformers_processors_choose(rules: GenerationRules, prompt: list[int], seed: int):
    """Step by step, prompts counted as they count them; where nothing is left to choose, the request fails."""
    sampler = SequenceSampler(SamplingParams(max_tokens=99), prompt, (), VOCABULARY, rules=rules)
    expected: Any = processors(rules, len(prompt))
    ids = list(prompt)
    noise = torch.Generator().manual_seed(seed)
    for _ in range(5):
        logits = torch.randn(1, VOCABULARY, generator=noise) * 3
        scores = expected(torch.tensor([ids]), logits.clone())
        (chosen,) = sample(logits, [sampler])
        if scores.amax() == -torch.inf:
            assert not isinstance(chosen, Sampled)
            return
        assert isinstance(chosen, Sampled)
        assert scores.argmax() == chosen.token
        sampler.accept(chosen.token)
        ids.append(chosen.token)


def test_a_row_with_rules_changes_nothing_for_the_others():
    """Of the same step, with and without biases of their own."""
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    rules = GenerationRules(suppress_tokens=(1,), sequence_bias=(((2,), -5.0),))
    samplers = [
        SequenceSampler(SamplingParams(), [0], (), 4),
        SequenceSampler(SamplingParams(logit_bias=((2, 4.5),)), [0], (), 4, rules=rules),
        SequenceSampler(SamplingParams(logit_bias=((0, 9.0),)), [0], (), 4),
    ]

    assert [1, 2, 0] == [each.token for each in sample(logits, samplers) if isinstance(each, Sampled)]


FIELDS: dict[str, dict[str, Any]] = {
    "suppress": {"suppress_tokens": list(range(100, 281))},
    "begin": {"begin_suppress_tokens": list(range(20, 281))},
    "bad words": {"bad_words_ids": [[each] for each in range(60, 281)] + [[3, 4]]},
    "bias": {"sequence_bias": [[[each], 2.0] for each in range(30)]},
    "n-grams": {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 281))},
    "pairs": {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(6, 281))},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), eos_token_id=1)


def recommend(folder: Path, **fields: Any) -> LoadedModel:
    """Load a model whose makers say this of generating with it."""
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return load_folder(folder)


def generated(loaded: LoadedModel, engine: Any, **sampling: Any) -> list[int]:
    runner = make_runner(loaded, msgspec.structs.replace(SPEC, engine=engine, compile="none"))
    events: list[TokenEvent] = []
    runner.submit(Submit(1, PROMPT, SamplingParams(**{"max_tokens": 16} | sampling)))
    while runner.busy:
        runner.step(events.extend)
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("engine", ["batching", "serial"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_models_rules_are_followed_as_generate_follows_them(folder: Path, fields: dict[str, Any], engine: str):
    """By both runners, and whatever else a request asks for."""
    loaded = recommend(folder, **fields)
    pretrained: Any = loaded.pipeline.model
    with torch.inference_mode():
        whole = pretrained.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            generation_config=GenerationConfig(
                **fields, max_new_tokens=16, do_sample=False, eos_token_id=1, pad_token_id=0
            ),
        )
    expected = [token for token in whole[0, len(PROMPT) :].tolist() if token != 1]

    assert expected == generated(loaded, engine)
    others = replace(loaded.rules, no_repeat_ngram_size=0) if loaded.rules.no_repeat_ngram_size == 1 else NO_RULES
    assert expected != generated(replace(loaded, rules=others), engine)


def test_what_the_makers_recommend_has_the_names_of_a_request(folder: Path):
    """No sampling is temperature 0, whatever temperature stands beside it."""
    loaded = recommend(folder, do_sample=False, temperature=0.6, min_p=0.1, max_new_tokens=77, min_new_tokens=3)

    expected = {"temperature": 0.0, "min_p": 0.1, "max_tokens": 77, "min_tokens": 3}
    assert expected == dict(loaded.recommended)


def test_stop_strings_are_texts_or_the_tokens_that_no_text_shows(folder: Path):
    """Only the former can be found in a completion."""
    loaded = recommend(folder, stop_strings=["END", "<|endoftext|>", ""], eos_token_id=1)

    assert (("END",), (0, 1)) == (loaded.stop_strings, loaded.end_ids)


def test_the_default_of_a_class_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Llama's has an end token that many vocabularies use for something else."""
    folder = save_tiny_llama(tmp_path, eos_token_id=2)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: settings[key] for key in settings if key != "eos_token_id"}))

    assert (1,) == load_folder(folder).end_ids

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        assert () == load_folder(folder).end_ids
    assert "no file names an end token" in caplog.text


def test_what_is_not_honoured_is_one_line_that_names_the_fields(folder: Path, caplog: pytest.LogCaptureFixture):
    """And fields with values that ask for nothing are not among them."""
    with caplog.at_level(logging.WARNING):
        recommend(folder, typical_p=0.5, num_beams=4, guidance_scale=1.0, epsilon_cutoff=0.0, top_k=5)

    lines = [record.getMessage() for record in caplog.records if "not honoured" in record.getMessage()]
    assert ["generation_config.json: not honoured here: typical_p, num_beams"] == lines


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"suppress_tokens": "x"}, "suppress_tokens must be a list of token ids"),
        ({"begin_suppress_tokens": [1.5]}, "begin_suppress_tokens must be a list of token ids"),
        ({"bad_words_ids": {"a": 1}}, "bad_words_ids must be a list of lists of token ids"),
        ({"bad_words_ids": [1]}, "bad_words_ids must be a list of token ids"),
        ({"sequence_bias": [[1]]}, "sequence_bias must be a list of pairs"),
        ({"sequence_bias": [[[1], "x"]]}, "sequence_bias must have numbers"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be a whole number"),
        ({"stop_strings": [1]}, "stop_strings must be a text"),
        ({"stop_strings": ["x"] * 65}, "stop_strings has more than 64 texts"),
    ],
)
def test_a_field_without_meaning_is_refused_by_its_name(folder: Path, fields: dict[str, Any], reason: str):
    """In one line, as every other fault of a model's files."""
    with pytest.raises(LoadError, match=reason):
        recommend(folder, **fields)


def test_rules_about_tokens_that_the_model_has_not_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture):
    """With a warning; those about others stay."""
    with caplog.at_level(logging.WARNING):
        rules = recommend(folder, suppress_tokens=[3, 999], bad_words_ids=[[4, 999], [5]], eos_token_id=1).rules

    assert GenerationRules(suppress_tokens=(3,), bad_words_ids=((5,),)) == rules
    assert "suppress_tokens names tokens that the model does not have" in caplog.text


ROPE: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 128),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, 512),
    "yarn of a smaller window": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        256,
    ),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 256),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 256),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        128,
    ),
}


@pytest.mark.parametrize(("scaling", "expected"), ROPE.values(), ids=ROPE)
def test_a_scaled_rotary_embedding_widens_the_context_window(tmp_path: Path, scaling: dict[str, Any], expected: int):
    """Where the field of the window does not say so already; a configured limit is lower still."""
    folder = save_tiny_llama(tmp_path, max_position_embeddings=128, **({"rope_scaling": scaling} if scaling else {}))

    assert expected == load_folder(folder).context_length
    assert 100 == load_folder(folder, max_model_len=100).context_length
