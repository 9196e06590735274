"""The rate of the last minute."""

from app.telemetry.recent_rate import RecentRate


def test_a_rate_is_that_of_the_last_minute_only():
    now = 1000.0
    rate = RecentRate(lambda: now)
    nothing = rate.per_second()
    rate.add(60)
    now += 0.9
    rate.add(60)
    now += 58
    rate.add(120)
    all_of_it = rate.per_second()
    now += 1.2
    later = rate.per_second()
    now += 60

    assert [0, 4, 2, 0] == [nothing, all_of_it, later, rate.per_second()]
