"""The code blocks of README and docs: none is passed over in silence."""

import pytest

from tests.code_blocks import PAGES, RUN, blocks, matches


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str):
    """tests/e2e/test_docs.py runs what is in a language of `RUN` and has no reason."""
    assert [] == [
        f"{block} [{block.language}]" for block in blocks(page) if block.language not in RUN and not block.not_run
    ]


def test_the_pages_that_a_newcomer_follows_are_run():
    named = (
        "README.md docs/quick-start.md docs/chat.md docs/streaming.md docs/structured-output.md docs/clients.md".split()
    )
    ran = {block.page for page in PAGES for block in blocks(page) if block.output and not block.not_run}

    assert set(named) <= ran


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("Paris.\n", "Paris.\n"),
        ('{"a":1,\n "b":2}', '{"a":1,"b":2}\n'),
        ('{"id":"chatcmpl-...","b":2, ...', '{"id":"chatcmpl-12ab","b":2,"c":3}\n'),
        ('{"a":1, ...\n{"b":2}', '{"a":1,"c":{}}\n{"b":2}\n'),
        ("...\ndata: [DONE]", ": keep-alive\n\ndata: {}\n\ndata: [DONE]\n\n"),
    ],
)
def test_a_page_may_leave_out_and_break_lines(expected: str, printed: str):
    assert matches(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("Paris.", "Rome."),
        ("Paris.", "Paris. Rome."),
        ('{"a":1, ..., "b":2}', '{"a":1,"b":3}'),
        ("", "anything"),
        ("anything", ""),
    ],
)
def test_what_is_shown_must_be_printed(expected: str, printed: str):
    assert not matches(expected, printed)
