"""What the servers are asked, and how their events are understood."""

import json
import os
import random

import pytest

from bench.load import LOADS, MIXED
from bench.model import make_tokenizer
from bench.peers import PEERS, Ours, Setup, TransformersServe, Vllm
from bench.serve import conversations, parse
from bench.wire import StreamEvent
from bench.words import VOCABULARY, text


def test_a_text_of_n_words_is_a_prompt_of_n_tokens_and_back_again():
    """In a vocabulary of 49,152 entries; so each server gets prompts of exactly the length that the table says."""
    tokenizer = make_tokenizer()
    prompt = text(random.Random(7), 512)

    ids = tokenizer(prompt)["input_ids"]

    assert VOCABULARY == len(tokenizer) == 49_152
    assert 512 == len(ids)
    assert prompt == tokenizer.decode(ids)


def test_a_mixed_load_has_its_sizes_in_equal_numbers_and_in_the_same_order_for_each_server():
    """Drawn from the seed of the round alone."""
    (mixed,) = [load for load in LOADS if load.name == "mixed"]
    sizes = mixed.sizes_drawn(random.Random("mixed/0"))

    assert sizes == mixed.sizes_drawn(random.Random("mixed/0"))
    assert sizes != mixed.sizes_drawn(random.Random("mixed/1"))
    assert {6} == {sizes.count(size) for size in MIXED}


def test_the_turns_of_each_conversation_are_kept_apart():
    """The first and last of each are compared; a load without turns has none."""
    assert [[1, 2], [3, 4], [5, 6]] == conversations([1, 2, 3, 4, 5, 6], 2)
    assert [] == conversations([1, 2], 0)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize(
    ("peer", "name", "data", "expected"),
    [
        (Ours(), "delta", {"content": "a"}, StreamEvent(text="a")),
        (Ours(), "done", {"usage": USAGE}, StreamEvent(usage=(3, 2))),
        (Ours(), "error", {"error": "x"}, StreamEvent(error='{"error": "x"}')),
        (TransformersServe(), "", {"choices": [{"text": "a"}]}, StreamEvent(text="a")),
        (TransformersServe(), "", {"choices": [{"delta": {"role": "assistant"}}]}, StreamEvent()),
        (TransformersServe(), "", {"choices": [{"delta": {"content": "a"}}]}, StreamEvent(text="a")),
        (TransformersServe(), "", {"choices": [{"text": ""}], "usage": USAGE}, StreamEvent(usage=(3, 2))),
        (TransformersServe(), "", {"error": "x"}, StreamEvent(error="x")),
        (Vllm(), "", {"choices": [], "usage": USAGE}, StreamEvent(usage=(3, 2))),
    ],
)
def test_each_servers_events_are_understood(peer, name, data, expected):
    """Text, the count of tokens, or an error; whatever else they say is no piece of the answer."""
    assert expected == peer.parse(name, json.dumps(data))


def test_the_end_mark_of_a_stream_carries_no_text():
    """It is the one event that is not JSON."""
    assert StreamEvent() == Vllm().parse("", "[DONE]")


def test_vllm_gets_as_many_cores_as_the_others_and_none_of_our_libraries(tmp_path, monkeypatch):
    """By itself it keeps one free, and would be measured at half of its speed on two."""
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    cores = sorted(os.sched_getaffinity(0))

    environment = Vllm().environment(Setup(tmp_path, "float32", len(cores), tmp_path, "", vllm=tmp_path))

    assert ",".join(map(str, cores)) == environment["VLLM_CPU_OMP_THREADS_BIND"]
    assert str(openmp) == environment["LD_PRELOAD"]
    assert "PYTHONPATH" not in environment


def test_an_unknown_load_or_server_is_refused_by_name(capsys):
    """Half an hour later it would be a gap in the table."""
    with pytest.raises(SystemExit):
        parse(["--loads", "c1,c9"])

    assert "unknown: c9; known: c1," in capsys.readouterr().err


def test_a_quick_run_leaves_the_published_figures_alone():
    """One round says too little to stand in docs/benchmarks."""
    assert parse(["--quick"]).out is None
    assert parse([]).out.parts[-2:] == ("docs", "benchmarks")
    assert [peer.name for peer in PEERS] == parse(["--quick"]).only
