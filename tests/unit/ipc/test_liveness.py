"""When a worker counts as silent or as stuck, from what shows of it."""

from app.ipc.liveness import HEARTBEAT_SECONDS, Liveness, Pulse


def watched(*pulses: Pulse, busy: bool = True, seconds: float = 0.5) -> Liveness:
    """A liveness that has seen these, one after the other."""
    liveness = Liveness()
    for pulse in pulses:
        liveness.observe(pulse, busy=busy, seconds=seconds)
    return liveness


def test_a_process_that_shows_nothing_is_silent_and_not_stuck():
    """It was stopped; what it was doing has nothing to do with it."""
    liveness = watched(*[Pulse(3, 40, 7)] * 101)

    assert 50 == liveness.silent_seconds
    assert liveness.stalled_seconds < 2 * HEARTBEAT_SECONDS


def test_one_long_call_that_keeps_the_interpreter_is_alive():
    """No heartbeat gets through, but the process uses the processor, if only a share on a busy machine."""
    liveness = watched(*(Pulse(3, ticks / 20, 7) for ticks in range(100)))

    assert 0 == liveness.silent_seconds
    assert 49.5 == liveness.stalled_seconds


def test_threads_that_wait_for_the_interpreter_are_no_sign_of_life():
    """They look at it all the time, which takes a hundredth of a processor."""
    assert 49.5 == watched(*(Pulse(3, ticks / 200, 7) for ticks in range(100))).silent_seconds


def test_a_process_that_only_beats_is_stuck():
    """A lock that nobody frees: other threads go on, the work does not; each beat is seen by one look in two."""
    liveness = watched(*(Pulse(number // 2, 0, 7) for number in range(101)))

    assert 50 == liveness.stalled_seconds
    assert liveness.silent_seconds <= 0.5


def test_progress_and_rest_are_no_standstill():
    """Neither a worker that gets on nor one that has nothing to do is stuck."""
    assert 0 == watched(*(Pulse(1, 1, number) for number in range(100))).stalled_seconds
    assert 0 == watched(*(Pulse(number, 1, 7) for number in range(100)), busy=False).stalled_seconds


def test_a_sign_of_life_ends_the_silence():
    """After a suspension the process starts from nothing: it is not stuck at once."""
    liveness = watched(*[Pulse(3, 40, 7)] * 101, Pulse(4, 40, 7))

    assert 0 == liveness.silent_seconds
    assert liveness.stalled_seconds <= 2 * HEARTBEAT_SECONDS
