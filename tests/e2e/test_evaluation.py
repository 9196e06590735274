"""Evaluation of the embedded model in float32: what the service says of a text is what transformers says."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import ROOT, Service, Start

pytestmark = pytest.mark.e2e

FOLDER = ROOT / "models" / "tiny-chat"
CONTEXT = "The capital of France is"
CHOICES = [" Paris", " Berlin", " Rome and not Paris", " a very small town where nobody lives at all"]
TEXT = "Once upon a time there was a little dog. It lived in a house by the sea, and it was happy. " * 8


@pytest.fixture(scope="module")
def scorer(start: Start) -> Service:
    """The embedded model as it is evaluated: in float32, and with prompts that no filter changes."""
    return start(MODEL__DTYPE="float32", PII__ENABLED="false")


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@functools.cache
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@torch.inference_mode()
def reference(ids: Sequence[int]) -> torch.Tensor:
    """Return (tokens, vocab) float32: the log-probabilities of whatever follows each token."""
    logits: torch.Tensor = model()(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.float().log_softmax(dim=-1)


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def post(service: Service, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    reply = service.client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def likelihoods(service: Service, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """Ask for the likelihood of each continuation as lm-evaluation-harness does, and read it as it does."""
    answer = post(
        service,
        prompt=[[*context, *continuation] for context, continuation in pairs],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    found = []
    for choice, (context, _) in zip(answer["choices"], pairs, strict=True):
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
        found.append((sum(scores), greedy))
    return found


def expected(context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    rows = reference([*context, *continuation])[len(context) - 1 : -1]
    own = rows.gather(1, torch.tensor(list(continuation))[:, None])
    return float(own.double().sum()), rows.argmax(dim=-1).tolist() == list(continuation)


@functools.cache
def question() -> tuple[int, ...]:
    """A chat up to where the assistant begins."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(encode(text))


@torch.inference_mode()
def greedy(ids: Sequence[int]) -> list[int]:
    """Return what the model says greedily, without the end token."""
    whole = model().generate(torch.tensor([list(ids)]), max_new_tokens=60, do_sample=False)[0].tolist()
    said: list[int] = whole[len(ids) :]
    return [token for token in said if token not in model().generation_config.eos_token_id]


def test_choices_are_as_likely_as_transformers_finds_them(scorer: Service):
    """To 1e-4 in total, and greedy where they are; one that the model would end after is no exception."""
    context, said = encode(CONTEXT), greedy(question())
    pairs = [*((context, encode(choice)) for choice in CHOICES), (question(), said), (question(), said[:3])]
    references = [expected(*pair) for pair in pairs]

    assert [True, True] == [is_greedy for _, is_greedy in references[-2:]]
    for found, (score, is_greedy) in zip(likelihoods(scorer, pairs), references, strict=True):
        assert found[0] == pytest.approx(score, abs=1e-4)
        assert is_greedy == found[1]


def test_a_text_of_many_windows_is_as_likely_as_transformers_finds_it(scorer: Service):
    """As loglikelihood_rolling asks: behind the end token, in windows that see one token of the one before."""
    ids, width = encode(TEXT), 100
    starts = range(0, len(ids), width)
    prefixed = [0, *ids]
    pairs = [(prefixed[start : start + 1], prefixed[start + 1 : start + 1 + width]) for start in starts]

    found = [likelihoods(scorer, [pair])[0][0] for pair in pairs]

    for score, pair in zip(found, pairs, strict=True):
        # A hundred numbers of float32 that each were rounded.
        assert score == pytest.approx(expected(*pair)[0], abs=1e-4, rel=1e-6)


def test_a_prompt_that_fills_the_window_is_scored(scorer: Service):
    """With max_tokens 0 nothing has to fit behind it; every entry is transformers' own, and so is its rank."""
    ids = (encode(TEXT) * 20)[:2048]
    answer = post(scorer, prompt=ids, max_tokens=0, prompt_logprobs=2)

    (choice,) = answer["choices"]
    first, *others = choice["prompt_logprobs"]
    assert (None, "", "length") == (first, choice["text"], choice["finish_reason"])
    assert (2048, 0) == (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    for row, token, position in zip(reference(ids), ids[1:], others, strict=False):
        own = position[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert abs(own["rank"] - 1 - int((row > row[token]).sum())) <= 1
        assert set(map(str, row.topk(2).indices.tolist())) | {str(token)} >= set(position)
    assert 2047 == len(others)


def test_an_echoed_text_has_the_offsets_of_its_tokens(scorer: Service):
    """Whole and streamed alike: the tokens joined are the text, and each stands where it says."""
    body: dict[str, Any] = {"prompt": "Once upon a time \u20ac 5 \U0001f600", "max_tokens": 8, "temperature": 0}
    (choice,) = post(scorer, **body, echo=True, logprobs=2)["choices"]
    said = choice["logprobs"]
    assert choice["text"].startswith(body["prompt"])
    assert [None] == [score for score in said["token_logprobs"] if score is None] == said["top_logprobs"][:1]
    for token, start, end in zip(said["tokens"], said["text_offset"], said["text_offset"][1:], strict=False):
        if "\ufffd" not in token:
            assert choice["text"][start:end] == token

    parts: dict[str, list[Any]] = {name: [] for name in said}
    text = ""
    with scorer.client.stream(
        "POST", "/v1/completions", json={**body, "echo": True, "logprobs": 2, "stream": True}
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                (streamed,) = json.loads(line[6:])["choices"]
                text += streamed["text"]
                for name, values in (streamed["logprobs"] or {}).items():
                    parts[name] += values
    assert (choice["text"], said) == (text, parts)


def test_a_chat_is_scored_as_it_is_rendered(scorer: Service):
    """Each token of the client's messages and of the template around them."""
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    answer = post(scorer, "/v1/chat/completions", messages=messages, max_tokens=0, prompt_logprobs=0)
    ids = encode(tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    _, *positions = answer["prompt_logprobs"]
    assert [str(token) for token in ids[1:]] == [key for position in positions for key in position]
    for row, token, position in zip(reference(ids), ids[1:], positions, strict=False):
        assert position[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
    assert "" == answer["choices"][0]["message"]["content"]
