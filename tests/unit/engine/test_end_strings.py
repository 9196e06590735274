"""A model's own end strings end its completions, with them in the text; a stop string that no text shows is a token."""

from hypothesis import given
from hypothesis import strategies as st

from app.engine.stop_strings import EndStrings, hidden_stops, with_stop_tokens
from app.types import SamplingParams


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_a_text_ends_with_the_segment_that_completes_one(text: str, ends: list[str], size: int):
    """However the text is cut; what stands behind it in that segment stays."""
    strings, seen = EndStrings(ends), ""
    for start in range(0, len(text), size):
        seen += text[start : start + size]
        over = strings.feed(text[start : start + size])

        assert any(end in seen for end in ends) == over
        if over:
            return


class Named:
    """Knows two special tokens."""

    def hidden_token(self, name: str) -> int | None:
        return {"<|eot|>": 7, "<|end|>": 9}.get(name)


def test_stop_strings_that_name_special_tokens_are_stop_tokens():
    """By those tokens, so that the one that matched can be reported by its name; texts stay texts."""
    sampling = SamplingParams(stop=("x", "<|end|>", "<|eot|>", "<|none|>"), stop_token_ids=(8,))

    hidden = hidden_stops(sampling, Named())

    assert {9: "<|end|>", 7: "<|eot|>"} == hidden
    assert (7, 8, 9) == with_stop_tokens(sampling, hidden).stop_token_ids
    assert sampling is with_stop_tokens(sampling, {})
