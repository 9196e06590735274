"""One-time codes: one use, one latest code, an end, and nothing of them in the file."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.access.page_link import LINK_FILE, VALID_SECONDS, new_code, use_code

NOW = 1_796_000_000.0


def test_a_code_is_good_once(tmp_path: Path) -> None:
    code = new_code(tmp_path, NOW)

    assert [True, False] == [use_code(tmp_path, code, NOW + 1) for _ in range(2)]


def test_of_many_who_send_a_code_at_once_one_gets_in(tmp_path: Path) -> None:
    """As API processes of one machine do, too: removing the file is the use."""
    with ThreadPoolExecutor(16) as pool:
        for _ in range(50):
            code = new_code(tmp_path, NOW)
            used = list(pool.map(lambda _: use_code(tmp_path, code, NOW), range(16)))  # noqa: B023

            assert 1 == used.count(True)


def test_a_wrong_code_is_refused_and_leaves_the_right_one_good(tmp_path: Path) -> None:
    code = new_code(tmp_path, NOW)

    assert not any(use_code(tmp_path, wrong, NOW) for wrong in ("", "once_", code[:-1], f"{code}x", "\u00e9", "x\0"))
    assert use_code(tmp_path, code, NOW)


def test_an_old_code_and_one_before_the_latest_are_refused(tmp_path: Path) -> None:
    first, second = new_code(tmp_path, NOW), new_code(tmp_path, NOW)

    assert not use_code(tmp_path, first, NOW)
    assert not use_code(tmp_path, second, NOW + VALID_SECONDS + 1)
    assert not use_code(tmp_path, second, NOW)


def test_without_a_file_or_with_a_damaged_one_no_code_is_right(tmp_path: Path) -> None:
    code = new_code(tmp_path, NOW)
    for damaged in (b"", b"\xff\xfe", b"x y", b"only-one-word"):
        (tmp_path / LINK_FILE).write_bytes(damaged)

        assert not use_code(tmp_path, code, NOW)
    (tmp_path / LINK_FILE).unlink()

    assert not use_code(tmp_path, code, NOW)


def test_the_file_holds_no_code_and_is_its_owners_only(tmp_path: Path) -> None:
    code = new_code(tmp_path, NOW)

    assert code.removeprefix("once_") not in (tmp_path / LINK_FILE).read_text()
    assert 0o600 == stat.S_IMODE((tmp_path / LINK_FILE).stat().st_mode)
    assert [LINK_FILE] == [each.name for each in tmp_path.iterdir()]
