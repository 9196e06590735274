import random

import pytest

from bench.batches import SENTENCES, Figures, as_markdown, line


@pytest.mark.parametrize(("beside", "verdict"), [(129.0, "met"), (131.0, "missed")])
def test_the_ratio_of_whole_responses_stands_beside_its_target(beside: float, verdict: str):
    baseline = Figures(total_ms=100, first_token_ms=10, between_ms=2)

    table = as_markdown(baseline, Figures(total_ms=beside, first_token_ms=15, between_ms=2, lines_per_second=4.5))

    assert f"| whole response, ms | 100.0 | {beside} | {beside / 100:.2f} |" in table
    assert f"Target 1.3: {verdict}" in table
    assert "4.5 lines/s" in table


def test_no_two_lines_of_a_batch_are_alike():
    draw = random.Random(0)

    lines = [line(draw, number) for number in range(100)]

    assert 100 == len({each["custom_id"] for each in lines})
    assert 100 == len({each["body"]["messages"][0]["content"] for each in lines})
    assert all(any(sentence in str(each) for sentence in SENTENCES) for each in lines)
