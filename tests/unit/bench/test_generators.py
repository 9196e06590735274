"""The count of async generators that a token crosses."""

from bench.generators import crossed_generators


def test_a_token_crosses_no_more_generators_of_ours_than_it_did():
    """One more on this path costs every token of every stream; whoever adds one raises the number knowingly."""
    crossed = crossed_generators()

    assert {"EchoEngine.stream", "GenerationService.generate", "FrameResponse._ready_frames"} <= set(crossed)
    assert len(crossed) <= 7
