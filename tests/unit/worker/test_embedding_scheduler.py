"""Which texts are embedded in one pass: similar lengths, a bounded number of tokens, tenants in turn."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from app.worker.embedding.embedding_scheduler import MAX_PADDING, EmbeddingScheduler, Text

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def drain(scheduler: EmbeddingScheduler) -> list[list[Text]]:
    """Return all passes to the end."""
    passes: list[list[Text]] = []
    while scheduler:
        passes.append(scheduler.next_pass())
        assert passes[-1], "a pass without texts would never end"
    return passes


@given(requests=st.lists(st.tuples(st.sampled_from("abc"), LENGTHS), min_size=1, max_size=6), budget=st.integers(1, 60))
def test_every_text_is_embedded_once_within_the_budget(requests: list[tuple[str, list[int]]], budget: int):
    """A text that is longer than the budget has a pass for itself; no other is padded to more than twice its length."""
    scheduler = EmbeddingScheduler(budget)
    for number, (tenant, lengths) in enumerate(requests):
        scheduler.add(number, tuple(lengths), tenant=tenant)
    passes = drain(scheduler)

    found = sorted((text.request_id, text.position, text.length) for texts in passes for text in texts)
    assert found == [
        (number, place, length) for number, (_, lengths) in enumerate(requests) for place, length in enumerate(lengths)
    ]
    for texts in passes:
        longest = max(text.length for text in texts)
        assert len(texts) == 1 or len(texts) * longest <= budget
        assert all(text.length > MAX_PADDING * longest or len(texts) == 1 for text in texts)


def test_texts_of_similar_length_share_a_pass():
    scheduler = EmbeddingScheduler(40)
    scheduler.add(1, (3, 20, 19, 2, 3), tenant="a")
    assert [[20, 19], [3, 3, 2]] == [[text.length for text in texts] for texts in drain(scheduler)]


def test_the_texts_of_several_tenants_share_a_pass():
    scheduler = EmbeddingScheduler(100)
    for number, tenant in enumerate("abc"):
        scheduler.add(number, (10,), tenant=tenant)
    assert [{0, 1, 2}] == [{text.request_id for text in texts} for texts in drain(scheduler)]


def test_a_tenant_with_one_text_waits_for_one_pass_of_a_tenant_with_many():
    scheduler = EmbeddingScheduler(100)
    scheduler.add(1, (50,) * 100, tenant="many")
    scheduler.next_pass()
    scheduler.add(2, (5,), tenant="one")
    before = next(number for number in count() if any(text.request_id == 2 for text in scheduler.next_pass()))
    assert before <= 1


def test_two_tenants_with_many_texts_get_the_same_share():
    scheduler = EmbeddingScheduler(100)
    scheduler.add(1, (50,) * 100, tenant="a")
    scheduler.add(2, (5,) * 400, tenant="b")
    tokens = {1: 0, 2: 0}
    for _ in range(20):
        for text in scheduler.next_pass():
            tokens[text.request_id] += text.length
    assert abs(tokens[1] - tokens[2]) <= 200


def test_a_lower_priority_number_is_first():
    scheduler = EmbeddingScheduler(10)
    scheduler.add(1, (10, 10), tenant="a", priority=5)
    scheduler.add(2, (10,), tenant="b", priority=0)
    assert [2, 1, 1] == [text.request_id for texts in drain(scheduler) for text in texts]


def test_a_removed_request_has_no_more_texts():
    scheduler = EmbeddingScheduler(10)
    scheduler.add(1, (10, 10), tenant="a")
    scheduler.add(2, (10,), tenant="a")
    scheduler.next_pass()
    scheduler.remove(1)
    scheduler.remove(1)
    assert [2] == [text.request_id for texts in drain(scheduler) for text in texts]
    assert not scheduler
