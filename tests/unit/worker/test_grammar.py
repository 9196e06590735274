"""A completion with a grammar is what the grammar allows, and the rows beside it are what they are without it."""

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from jsonschema_rs import validator_for
from llguidance import LLParserLimits

from app.grammars import compiler
from app.grammars.compiler import create_matcher
from app.grammars.vocabulary import UnsupportedVocabularyError, Vocabulary, load_vocabulary
from app.ipc.messages import Submit, TokenEvent
from app.types import Grammar, SamplingParams
from app.worker.execution.serial.serial_runner import SerialRunner
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.loaded_model import LoadedModel
from app.worker.sampling import grammar as grammar_module
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.tiny_models import chatml_tokenizer, gemma_tokenizer, llama_tokenizer, save, token_id
from tests.unit.worker.families import loaded, make
from tests.unit.worker.json_schemas import all_schemas
from tests.waiting import HANG_SECONDS

TOKENIZER = chatml_tokenizer()
END = token_id(TOKENIZER, "<|im_end|>")
WIDTH = len(TOKENIZER) + 7
"""More than the tokenizer has, as many models round it up."""
CONTEXT = 512
PROMPT = (5, 6, 7)
CLOSING = tuple(sorted((token_id(TOKENIZER, mark), 6.0) for mark in ('"', "}", "]", "<|im_end|>")))
"""A bias that lets random weights come to an end."""
MAX_FLOAT = 1.7976931348623157e308


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(save(TOKENIZER, tmp_path_factory.mktemp("tokenizer")), WIDTH)


def fresh_model() -> Any:
    """Return the same weights each time; a model that a batching runner has computes for nobody else."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = hf.LlamaConfig(vocab_size=WIDTH, max_position_embeddings=CONTEXT, **sizes, **ids)
    return make(lambda: hf.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh_model()


def loaded_model(model: Any, vocabulary: Vocabulary | None, end_ids: tuple[int, ...] = (END,)) -> LoadedModel:
    facts: dict[str, Any] = {
        "context_length": CONTEXT,
        "vocab_size": WIDTH,
        "end_ids": end_ids,
        "vocabulary": vocabulary,
    }
    return replace(loaded(model), **facts)


@pytest.fixture
def runner(model: Any, vocabulary: Vocabulary) -> BatchingRunner:
    return runner_for(model, vocabulary)


def runner_for(
    model: Any, vocabulary: Vocabulary, *, slots: int = 8, end_ids: tuple[int, ...] = (END,)
) -> BatchingRunner:
    model_runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    return BatchingRunner(loaded_model(model, vocabulary, end_ids), model_runner)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value, ensure_ascii=False))


def submit(runner: BatchingRunner, grammar: Grammar | None, number: int = 1, **settings: Any) -> None:
    requests = {"max_tokens": 60, "temperature": 1.0, "seed": number, "grammar": grammar} | settings
    runner.submit(Submit(number, PROMPT, SamplingParams(**requests)))


def run(runner: BatchingRunner | SerialRunner) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while runner.busy:
        runner.step(events.extend)
    return events


def text_of(events: Sequence[TokenEvent], number: int = 1) -> str:
    ids = [token for event in events if event.id == number for token in event.token_ids]
    return str(TOKENIZER.decode(ids))


def last_of(events: Sequence[TokenEvent], number: int = 1) -> TokenEvent:
    return next(event for event in reversed(events) if event.id == number)


def clamped(digits: str) -> float:
    """Read a number; JSON has no greatest one, and floats do."""
    return min(max(float(digits), -MAX_FLOAT), MAX_FLOAT)


def is_valid(given: Any, text: str) -> bool:
    return validator_for(given, validate_formats=True).is_valid(json.loads(text, parse_float=clamped))


def test_what_ends_by_itself_parses_and_validates(model: Any, vocabulary: Vocabulary):
    """More than 300 schemas of all kinds, by a model of random weights, eight at a time."""
    schemas, runner = all_schemas(), runner_for(model, vocabulary)
    for number, each in enumerate(schemas):
        submit(runner, schema(each), number, max_tokens=90, logit_bias=CLOSING)

    events = run(runner)

    assert len(schemas) > 300
    assert [] == [(schemas[event.id], event.error) for event in events if event.error]
    ended = [number for number in range(len(schemas)) if last_of(events, number).finish == "stop"]
    assert len(ended) > 0.9 * len(schemas)
    wrong = [(schemas[n], text_of(events, n)) for n in ended if not is_valid(schemas[n], text_of(events, n))]
    assert [] == wrong


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        (Grammar("regex", "(ab|cd){2}"), {"abab", "abcd", "cdab", "cdcd"}),
        (Grammar("lark", 'start: "yes" | "no" | "maybe"'), {"yes", "no", "maybe"}),
        (Grammar("lark", 'root ::= "a" tail\ntail ::= "b" | "cc"'), {"ab", "acc"}),
    ],
)
def test_expressions_and_grammars_are_followed(runner: BatchingRunner, grammar: Grammar, allowed: set[str]):
    for number in range(6):
        submit(runner, grammar, number)

    events = run(runner)

    assert {text_of(events, number) for number in range(6)} <= allowed
    assert {"stop"} == {last_of(events, number).finish for number in range(6)}


def test_rows_with_and_without_a_grammar_are_what_they_are_alone(model: Any, vocabulary: Vocabulary):
    """Greedy and sampled, in one batch."""
    requests: list[dict[str, Any]] = [
        {"grammar": schema({"type": "object"}), "logit_bias": CLOSING},
        {"grammar": None},
        {"grammar": None, "temperature": 0.0},
        {"grammar": schema({"enum": ["a", "b"]}), "temperature": 0.0},
        {"grammar": Grammar("regex", "[a-z]{20}"), "top_k": 3, "presence_penalty": 1.0},
        {"grammar": None, "top_p": 0.8, "repetition_penalty": 1.3},
        {"grammar": Grammar("regex", "x+"), "min_tokens": 9, "max_tokens": 9},
    ]
    mixed = runner_for(model, vocabulary)
    for number, each in enumerate(requests):
        submit(mixed, number=number, **each)
    events = run(mixed)

    for number, each in enumerate(requests):
        single = runner_for(model, vocabulary)
        submit(single, number=number, **each)
        expected = run(single)
        assert text_of(expected, number) == text_of(events, number)
        assert last_of(expected, number).finish == last_of(events, number).finish


def test_log_probabilities_are_the_models_own(runner: BatchingRunner):
    """As if there were no grammar, alternatives that it does not allow among them."""
    submit(runner, Grammar("regex", "q{3}"), temperature=0.0, logprobs=3)

    events = run(runner)

    reported = [logprob for event in events for logprob in event.logprobs]
    ids = [*PROMPT, *(each.token_id for each in reported)]
    with torch.inference_mode():
        own = fresh_model()(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert "qqq" == text_of(events)
    for place, each in enumerate(reported):
        assert own[place, each.token_id].item() == pytest.approx(each.logprob, abs=1e-4)
        assert own[place].argmax().item() == each.top[0][0]


def test_a_completion_that_max_tokens_cuts_says_length(runner: BatchingRunner):
    submit(runner, Grammar("regex", "a{50}"), max_tokens=7)

    events = run(runner)

    assert ("a" * 7, "length") == (text_of(events), last_of(events).finish)


def test_a_completion_that_is_complete_ends_without_another_step(runner: BatchingRunner):
    """The last token that the grammar allows comes with the end, also where it is the last of max_tokens."""
    submit(runner, Grammar("regex", "a{7}"), max_tokens=7)

    last = last_of(run(runner))

    assert ("stop", None, 1) == (last.finish, last.end_token, len(last.token_ids))


@pytest.mark.parametrize("settings", [{}, {"min_tokens": 40}])
def test_the_model_may_end_where_the_grammar_lets_it(runner: BatchingRunner, settings: dict[str, Any]):
    """By an end token, and not before min_tokens as long as the grammar has more."""
    submit(runner, Grammar("regex", "a*"), logit_bias=((END, 9.0),), **settings)

    events = run(runner)

    assert ("stop", END) == (last_of(events).finish, last_of(events).end_token)
    assert settings.get("min_tokens", 0) <= len(text_of(events)) < 60


def test_min_tokens_gives_way_where_only_the_end_is_allowed(runner: BatchingRunner):
    submit(runner, Grammar("regex", "ab"), min_tokens=20)

    events = run(runner)

    assert ("ab", "stop") == (text_of(events), last_of(events).finish)


@pytest.mark.parametrize(("end_ids", "ignore"), [((), False), ((END,), True)])
def test_without_an_end_token_a_completion_ends_where_the_grammar_does(
    model: Any, vocabulary: Vocabulary, end_ids: tuple[int, ...], ignore: bool
):
    """For a model that has none, and with ignore_eos; no end token is in the text."""
    runner = runner_for(model, vocabulary, end_ids=end_ids)
    submit(runner, Grammar("regex", "a{3,5}"), ignore_eos=ignore)

    events = run(runner)

    assert ("aaaaa", "stop", None) == (text_of(events), last_of(events).finish, last_of(events).end_token)


def test_one_seed_gives_one_completion_and_its_samples_differ(model: Any, vocabulary: Vocabulary):
    grammar, texts = Grammar("regex", "[a-z]{12}"), []
    for _ in range(2):
        runner = runner_for(model, vocabulary)
        for sample in range(3):
            submit(runner, grammar, sample, seed=4, sample=sample)
        events = run(runner)
        texts.append([text_of(events, sample) for sample in range(3)])

    assert texts[0] == texts[1]
    assert 3 == len(set(texts[0]))


def test_a_stop_token_of_the_request_ends_the_completion(runner: BatchingRunner):
    stop = token_id(TOKENIZER, "b")
    submit(runner, Grammar("regex", "ab+"), stop_token_ids=(stop,))

    events = run(runner)

    assert ("a", stop) == (text_of(events), last_of(events).end_token)


def test_a_grammar_that_cannot_be_enforced_fails_its_own_request(runner: BatchingRunner):
    submit(runner, Grammar("regex", "("), 1)
    submit(runner, schema({"not": {}}), 2)
    submit(runner, None, 3)

    events = run(runner)

    assert [True, True, False] == [last_of(events, number).invalid for number in (1, 2, 3)]
    assert "`not`" in str(last_of(events, 2).error)
    assert last_of(events, 3).finish


def test_a_request_whose_grammar_is_being_compiled_can_be_cancelled(
    runner: BatchingRunner, monkeypatch: pytest.MonkeyPatch
):
    """Nobody waits for the compiler: another request is served while it works."""
    slow, may_end = create_matcher, threading.Event()

    def create(*given: Any) -> Any:
        may_end.wait(HANG_SECONDS)
        return slow(*given)

    monkeypatch.setattr(grammar_module, "create_matcher", create)
    submit(runner, Grammar("regex", "a"), 1)
    submit(runner, None, 2, max_tokens=3, ignore_eos=True)
    events: list[TokenEvent] = []
    while not any(event.finish for event in events):
        runner.step(events.extend)
    runner.cancel(1)
    may_end.set()
    events += run(runner)

    assert [(2, "length"), (1, "abort")] == [(event.id, event.finish) for event in events if event.finish]
    assert not any(event.token_ids for event in events if event.id == 1)


def test_a_mask_that_takes_long_holds_up_no_other_row(
    runner: BatchingRunner, model: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    """Its row is sampled later, and is what it is otherwise."""
    grammar = Grammar("regex", "[a-z]{3}")
    quick = runner_for(model, vocabulary)
    submit(quick, grammar, 1)
    expected = text_of(run(quick))
    compute, may_end = grammar_module.Grammars._compute, threading.Event()

    def slowly(*given: Any) -> None:
        may_end.wait(HANG_SECONDS)
        compute(*given)

    monkeypatch.setattr(grammar_module.Grammars, "_compute", slowly)
    submit(runner, grammar, 1)
    submit(runner, None, 2, max_tokens=12, ignore_eos=True)

    events: list[TokenEvent] = []
    while not events or last_of(events, 2).finish is None:
        runner.step(events.extend)
    assert not any(event.token_ids for event in events if event.id == 1)
    may_end.set()
    events += run(runner)

    assert expected == text_of(events)


def test_a_model_without_a_vocabulary_has_no_grammars(model: Any, serial_model: LoadedModel):
    model_runner = create_torch_runner(model, length=CONTEXT, slots=2, free_bytes=10**9)

    assert ("grammar",) == BatchingRunner(loaded_model(model, None), model_runner).unsupported
    assert "grammar" in SerialRunner(replace(serial_model, vocabulary=None)).unsupported


@pytest.fixture(scope="module")
def serial_model(vocabulary: Vocabulary) -> LoadedModel:
    model = fresh_model()
    pipeline = hf.pipeline("text-generation", model=model, tokenizer=TOKENIZER, device="cpu")
    return replace(loaded_model(model, vocabulary), pipeline=pipeline)


@pytest.mark.parametrize(
    ("grammar", "settings", "ending"),
    [
        (Grammar("regex", "a{4}b"), {"max_tokens": 30}, "stop"),
        (Grammar("regex", "a{9}"), {"max_tokens": 4}, "length"),
        (Grammar("lark", 'start: "yes" | "no"'), {"max_tokens": 9, "temperature": 1.5}, "stop"),
        (
            schema({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}),
            {"max_tokens": 90},
            "stop",
        ),
    ],
)
def test_the_serial_runner_follows_grammars_too(
    serial_model: LoadedModel, model: Any, vocabulary: Vocabulary, grammar: Grammar, settings: Any, ending: str
):
    """Greedy, it writes what the batching runner writes."""
    params = SamplingParams(**({"grammar": grammar, "seed": 3} | settings))
    serial, batching = SerialRunner(serial_model), runner_for(model, vocabulary)
    for each in (serial, batching):
        each.submit(Submit(1, PROMPT, params))

    single, batched = run(serial), run(batching)

    assert ending == last_of(single).finish
    assert "grammar" not in serial.unsupported
    if params.temperature == 0:
        assert text_of(batched) == text_of(single)
    else:
        assert text_of(single) in ("yes", "no")


def test_the_serial_runner_refuses_what_cannot_be_enforced(serial_model: LoadedModel):
    runner = SerialRunner(serial_model)
    runner.submit(Submit(1, PROMPT, SamplingParams(grammar=Grammar("regex", "("))))

    assert last_of(run(runner)).invalid


HUNGRY = Grammar("regex", "(.|\n)*[ab](.|\n){12}")
"""Its lexer gets more states with each text."""


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the lexer have what one completion of 20 tokens needs, and not what several need together."""
    limits = LLParserLimits(
        initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_lexer_states=300, verbose_errors=False
    )
    monkeypatch.setattr(compiler, "LIMITS", limits)


def letters(seed: int, count: int = 20) -> list[int]:
    draw = random.Random(seed)
    return [token_id(TOKENIZER, draw.choice("ac")) for _ in range(count)]


@pytest.mark.usefixtures("few_states")
@pytest.mark.parametrize("slow_seconds", [0, 60], ids=["slow masks", "fast masks"])
def test_completions_do_not_use_up_a_grammar_for_those_that_follow(
    slow_seconds: float, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    """Nor for those beside them; each goes on where it was, with a matcher of its own."""
    monkeypatch.setattr(grammar_module, "SLOW_SECONDS", slow_seconds)
    grammars = grammar_module.Grammars(vocabulary)
    rows = [grammars.row(grammars.compile(HUNGRY), (END,)) for _ in range(4)]
    for tokens in zip(*map(letters, range(4)), strict=True):
        grammars.begin_masks(rows)
        while not all(row.is_ready for row in rows):
            grammars.wait_for_masks(rows, 1)
            grammars.begin_masks(rows)
        for row, token in zip(rows, tokens, strict=True):
            assert row.failure is None
            assert row.bits[token // 8] >> token % 8 & 1
            row.accept(token)

    for seed in range(4, 24):
        row = grammars.row(grammars.compile(HUNGRY), (END,))
        for token in letters(seed):
            grammars.compute_mask(row)
            assert row.failure is None
            row.accept(token)


@pytest.mark.usefixtures("few_states")
def test_a_completion_that_meets_the_limit_by_itself_fails_and_spoils_nothing(vocabulary: Vocabulary):
    grammars = grammar_module.Grammars(vocabulary)
    compilation = grammars.compile(HUNGRY)
    row = grammars.row(compilation, (END,))
    for token in letters(0, 90):
        grammars.compute_mask(row)
        if row.failure is not None:
            break
        row.accept(token)

    assert "The completion cannot go on: its grammar is too complex." == row.failure
    assert compilation is not grammars.compile(HUNGRY)


def test_a_compiled_grammar_serves_eight_completions(vocabulary: Vocabulary):
    grammars = grammar_module.Grammars(vocabulary)

    compilations = [grammars.compile(HUNGRY) for _ in range(17)]

    assert [8, 8, 1] == [each.uses for each in (compilations[0], compilations[8], compilations[16])]
    assert 3 == len({id(each) for each in compilations})


@pytest.mark.parametrize("kind", ["batching", "serial"])
@pytest.mark.parametrize("part", ["create_matcher", "_thread_with_stack"])
def test_a_compiler_that_breaks_fails_one_request_with_a_fixed_reason(
    model: Any,
    serial_model: LoadedModel,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    part: str,
):
    """Its message could quote the grammar."""
    runner = SerialRunner(serial_model) if kind == "serial" else runner_for(model, vocabulary)

    def fail(*_: Any) -> Any:
        raise RuntimeError("anna@example.com")

    monkeypatch.setattr(grammar_module, part, fail)
    runner.submit(Submit(1, PROMPT, SamplingParams(grammar=Grammar("regex", "a"))))
    runner.submit(Submit(2, PROMPT, SamplingParams(max_tokens=2)))

    events = run(runner)

    assert ("The grammar cannot be enforced.", True) == (last_of(events, 1).error, last_of(events, 1).invalid)
    assert last_of(events, 2).finish


def test_an_end_token_that_writes_text_does_not_stand_inside_a_completion(model: Any, vocabulary: Vocabulary):
    """Some models end with a token that the tokenizer does not call special."""
    letter = token_id(TOKENIZER, "b")
    runner = runner_for(model, vocabulary, end_ids=(letter,))
    for number in range(4):
        submit(runner, Grammar("regex", "[ab]{30}"), number, logit_bias=((letter, 9.0),))

    events = run(runner)

    assert [30] * 4 == [len(text_of(events, number)) for number in range(4)]
    assert {"stop"} == {last_of(events, number).finish for number in range(4)}


def test_end_tokens_that_no_mask_has_end_nothing(vocabulary: Vocabulary):
    """The completion is over as if there were none."""
    grammars = grammar_module.Grammars(vocabulary)
    row = grammars.row(grammars.compile(Grammar("regex", "a")), (10**6,))
    bits = torch.zeros(vocabulary.mask_bytes, dtype=torch.uint8).numpy()
    bits[vocabulary.end // 8] |= 1 << vocabulary.end % 8

    row.take_mask(bits)

    assert row.is_over


def test_a_row_that_is_known_to_be_slow_is_not_waited_for(runner: BatchingRunner, monkeypatch: pytest.MonkeyPatch):
    """As long as there are others, which would be slower by the wait in each step."""
    compute, wait = grammar_module.Grammars._compute, grammar_module.Grammars.wait_for_masks
    waited_for_slow: list[bool] = []

    def slowly(*given: Any) -> None:
        time.sleep(0.02)
        compute(*given)
        for row in given[1]:
            row.slow = True

    def note(self: Any, rows: Any, seconds: float) -> None:
        waited_for_slow.extend(row.slow for row in rows)
        wait(self, rows, seconds)

    monkeypatch.setattr(grammar_module.Grammars, "_compute", slowly)
    monkeypatch.setattr(grammar_module.Grammars, "wait_for_masks", note)
    submit(runner, Grammar("regex", "a{60}"), 1)
    submit(runner, None, 2, max_tokens=400, ignore_eos=True)
    events: list[TokenEvent] = []
    while not any(event.finish for event in events):
        runner.step(events.extend)

    assert any(event.id == 1 and event.token_ids for event in events)
    assert {False} == set(waited_for_slow)


def wordpiece_tokenizer() -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = [chr(code) for code in range(33, 127)]
    words = ["[UNK]", "[SEP]", *marks, *(f"##{mark}" for mark in marks), "hello", "##llo"]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


def unigram_tokenizer() -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = [chr(code) for code in range(33, 127)]
    scored = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((mark, -3.0) for mark in marks), ("▁hello", -1.0)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    "tokenizer", [chatml_tokenizer(), gemma_tokenizer(), llama_tokenizer(), unigram_tokenizer(), wordpiece_tokenizer()]
)
def test_the_vocabularies_of_all_families_spell_json(tokenizer: hf.PreTrainedTokenizerFast, tmp_path: Path):
    """Byte-level, SentencePiece with bytes and without, and words with their parts; white space aside."""
    vocabulary = load_vocabulary(save(tokenizer, tmp_path), len(tokenizer))
    grammars, draw = grammar_module.Grammars(vocabulary), random.Random(5)
    wanted: dict[str, Any] = {"type": "object", "properties": {"hello": {"enum": [7, 42]}}, "required": ["hello"]}
    wanted |= {"additionalProperties": False}

    for _ in range(5):
        row, ids = grammars.row(grammars.compile(schema(wanted)), ()), list[int]()
        while not row.is_over and len(ids) < 200:
            grammars.compute_mask(row)
            assert row.failure is None
            allowed = [n for n in range(vocabulary.end) if row.bits[n // 8] >> n % 8 & 1]
            ids.append(draw.choice(allowed))
            row.accept(ids[-1])
        # Behind another text: a part of a word continues it.
        before = token_id(tokenizer, "a")
        text = str(tokenizer.decode([before, *ids]))[len(str(tokenizer.decode([before]))) :]
        assert json.loads(text) in ({"hello": 7}, {"hello": 42})


def test_a_tokenizer_that_does_not_say_what_its_tokens_write_is_refused(tmp_path: Path):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend)

    with pytest.raises(UnsupportedVocabularyError):
        load_vocabulary(save(tokenizer, tmp_path), 2)
