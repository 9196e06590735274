"""How many traces begin."""

from app.telemetry.otlp import AtMost


def test_so_many_traces_begin_in_a_second_and_the_others_do_not() -> None:
    """Those of a quiet second are not saved up for the next."""
    now = 100.0
    limit = AtMost(3, clock=lambda: now)

    def begun(count: int) -> int:
        return sum(limit.take() for _ in range(count))

    at_once = begun(10)
    now += 0.5
    half_a_second_later = begun(10)
    now += 60
    after_a_minute = begun(10)

    assert (3, 1, 3) == (at_once, half_a_second_later, after_a_minute)
