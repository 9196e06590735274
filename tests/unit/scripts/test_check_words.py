"""The word list of `make lint`: what it finds, and what it leaves alone."""

import time
from pathlib import Path

import pytest

from scripts.check_words import ALLOWED, FOLDERS, NAMES, ROOT, SELF, WORDS, check, main, sources


def found(text: str, path: str = "app/example.py") -> list[tuple[int, str]]:
    return [(finding.line, finding.found) for finding in check(path, text)]


@pytest.mark.parametrize(
    "code",
    [
        "class ChatAsk: ...",
        "ask_id = 1",
        "def settle(): ...",
        "def test_each_ask_ends(): ...",
        "def test_an_engine_knows_no_text(): ...",
        "TOLD = 1",
        "from app.access import KeyRing",
        "class Answers: ...",
        "value.go_on = True",
        "f(held_back=1)",
    ],
)
def test_an_identifier_with_a_private_word_is_found(code: str):
    assert 1 == len(found(code))


@pytest.mark.parametrize(
    "code",
    [
        "task = basket = masked = 1",
        "string = settings",
        '"""Tells the caller; each request is settled, asks for more and is told."""',
        "x = 1  # it is made of pieces that were kept together",
        'x = "asks"',
        'x = {"turns_kept": 1}',
        '"""As SentencePiece cuts it."""',
        "made_up_word = 1",
        "asyncio.gather(one, two)",
        "def test_a_quota_is_settled_once_and_its_rows_are_kept(): ...",
        "x = 'a quote with \"asks\" in it'",
    ],
)
def test_ordinary_english_and_longer_words_are_not(code: str):
    assert [] == found(code)


def test_an_identifier_of_several_words_is_found_in_prose_and_docs_too():
    assert [(3, "EngineAround")] == found('"""A summary.\n\nSee `EngineAround`."""\n')
    assert [(1, "go_on")] == found("Set `go_on` to continue; it asks for nothing.\n", "docs/page.md")


def test_a_phrase_is_found_across_the_lines_of_a_comment():
    assert [(1, "Knows no")] == found('"""Knows no HTTP."""\n')
    assert [(2, "knows no")] == found("x = 1\n# The engine knows\n#   no text.\n")


def test_names_of_cpp_are_checked_in_cpp_only():
    code = "int soften; float PANEL;  // mosts\nauto x = gather(1);\n"

    assert [(1, "PANEL"), (1, "soften"), (2, "gather")] == found(code, "app/worker/x.cpp")
    assert [] == found("gather(1)\nPANEL = 1\n", "app/worker/x.py")


@pytest.mark.parametrize("path", ["app/utils.py", "tests/unit/test_asks.py", "app/worker/native/together.h"])
def test_a_file_name_is_checked_as_well(path: str):
    assert 1 == len(check(path, ""))


def test_a_finding_names_file_line_and_the_standard_term():
    assert "app/x.py:2: EngineAround: EngineWrapper" == str(check("app/x.py", "\nEngineAround\n")[0])


def test_the_exit_status_says_whether_there_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clean, private, words = tmp_path / "clean.py", tmp_path / "private.py", tmp_path / SELF[0]
    words.parent.mkdir()
    clean.write_text("x = 1\n")
    private.write_text("class Ticket: ...\n")
    words.write_text("class Ticket: ...\n")

    assert 0 == main([str(clean), str(words)], tmp_path), "the list itself is not checked"
    assert "" == capsys.readouterr().out
    assert 1 == main([str(tmp_path)], tmp_path)
    assert "private.py:1: Ticket: live request\n" == capsys.readouterr().out


def test_no_word_is_both_private_and_allowed():
    private = {word for words in (*WORDS, *NAMES) for word in words.split()}

    assert not private & {name for names in ALLOWED for name in names.split()}


def test_every_folder_exists_and_all_are_read_in_seconds():
    began = time.process_time()

    main()

    assert time.process_time() - began < 10
    assert all((ROOT / folder).exists() for folder in FOLDERS)
    assert Path(__file__) in set(sources([ROOT / "tests"]))
