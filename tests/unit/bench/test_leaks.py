"""What a long run may keep."""

import random

import pytest

from bench.leaks import Sample, growth

MB = 1_000_000


def samples(megabytes: list[float], fds: int = 20, threads: int = 10) -> list[Sample]:
    return [Sample(round(each * MB), fds, threads) for each in megabytes]


def test_a_process_that_fills_up_and_then_stays_is_fine():
    """Half the memory came in the first quarter of the run, and a noisy level is no growth."""
    draw = random.Random(1)
    level = [100.0, 150, 180, 200, 205, 208] + [210 + draw.uniform(-3, 3) for _ in range(24)]

    assert [] == growth(samples(level))


def test_memory_that_grows_by_a_megabyte_a_minute_is_a_leak():
    """Slow, but it never stops."""
    grown = growth(samples([200.0 + minute for minute in range(30)]))

    assert 1 == len(grown)
    assert grown[0].startswith("rss_bytes grew by")


@pytest.mark.parametrize("name", ["fds", "threads"])
def test_a_file_descriptor_or_thread_left_behind_each_minute_is_a_leak(name):
    """Far fewer than one for each request."""
    grown = growth([Sample(200 * MB, **{"fds": 20, "threads": 10, name: 10 + minute}) for minute in range(30)])

    assert [name] == [line.split()[0] for line in grown]


def test_a_run_that_is_too_short_to_judge_says_so():
    """Three samples show no trend."""
    with pytest.raises(ValueError, match="fewer than 4"):
        growth(samples([1, 2, 3]))
