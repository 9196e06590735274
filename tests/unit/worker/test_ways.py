"""The choice of a way from a table of times, without a clock."""

from collections.abc import Mapping

import pytest
import torch

from app.ipc.messages import Compiled
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.packed_batch import PackedBatch, Segment
from app.worker.execution.ways import MeasuredExecutor, Shape, TimeTable

ONE, MANY, SHORT, LONG = Shape("decode", 1), Shape("decode", 32), Shape("prompt", 16), Shape("prompt", 512)
PANELS = {ONE: 0.010, MANY: 0.030, SHORT: 0.020, LONG: 0.500}
TILES = {ONE: 0.030, MANY: 0.040, SHORT: 0.040, LONG: 0.250}
TABLE = TimeTable({"panels": PANELS, "tiles": TILES})


class Recorder:
    """An executor that notes the sizes of its batches and the adapters that it is to forget."""

    def __init__(self, compiled: Compiled | None = None) -> None:
        self.compiled: Compiled | None = compiled
        self.sizes: list[int] = []
        self.forgotten: list[LoraAdapter] = []

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.sizes.append(batch.size)
        return torch.empty(0)

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        self.forgotten.append(adapter)


def batch(*tokens: int) -> PackedBatch:
    """So many tokens of each slot."""
    segments = [Segment(slot, 0, [1] * count) for slot, count in enumerate(tokens)]
    return PackedBatch(segments, [True] * len(segments), torch.device("cpu"))


def scaled(times: Mapping[Shape, float], factor: float) -> dict[Shape, float]:
    return {shape: factor * seconds for shape, seconds in times.items()}


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        (ONE, "panels"),
        (Shape("decode", 8), "panels"),
        (MANY, "panels"),
        (Shape("prompt", 5), "panels"),
        (Shape("prompt", 40), "panels"),
        (Shape("prompt", 100), "tiles"),
        (LONG, "tiles"),
        (Shape("prompt", 4000), "tiles"),
    ],
)
def test_a_step_takes_the_fastest_way_for_its_size(shape: Shape, way: str) -> None:
    """Sizes that were not measured lie on the line between their neighbours, larger ones cost what a token costs."""
    assert way == TABLE.fastest(["panels", "tiles"], shape)


def test_a_way_that_becomes_slower_is_chosen_less() -> None:
    """Until it is chosen for nothing."""
    ways = ["panels", "tiles"]

    assert ["panels", "tiles"] == TABLE.used(ways)
    assert ["tiles"] == TimeTable({"panels": scaled(PANELS, 5), "tiles": TILES}).used(ways)
    assert ["panels"] == TimeTable({"panels": PANELS, "tiles": scaled(TILES, 5)}).used(ways)


def test_a_difference_within_the_noise_of_a_measurement_changes_no_way() -> None:
    table = TimeTable({"first": PANELS, "second": {**PANELS, LONG: 0.96 * PANELS[LONG]}})

    assert 1 == len(table.used(["first", "second"]))


def test_one_copy_of_the_weights_is_the_one_that_serves_requests_fastest() -> None:
    """Three times as slow for single tokens is worse than half as fast for prompts; five times as slow prompts are."""
    layouts = [["panels"], ["tiles"]]

    assert [0] == TABLE.choose(layouts, 1)
    assert [1] == TimeTable({"panels": {**PANELS, LONG: 2.5}, "tiles": TILES}).choose(layouts, 1)


def test_a_second_copy_is_kept_only_where_it_saves_time() -> None:
    """However many are allowed; layouts all of whose ways failed are none."""
    alike = TimeTable({"panels": PANELS, "tiles": scaled(PANELS, 0.97)})

    assert [0, 1] == TABLE.choose([["panels"], ["tiles"]], 2)
    assert [1] == alike.choose([["panels"], ["tiles"]], 5)
    assert [1] == TABLE.choose([[], ["panels"]], 2)


def test_without_a_measurement_the_first_way_is_taken_for_everything() -> None:
    table = TimeTable({"first": {}, "second": {}})

    assert [0] == table.choose([["first"], ["second"]], 2)
    assert ["first"] == table.used(["first", "second"])


def test_a_mixed_batch_counts_as_a_prompt_of_all_its_tokens() -> None:
    """Single tokens of several sequences do not, however many they are."""
    panels, tiles = Recorder(), Recorder()
    executor = MeasuredExecutor({"panels": panels, "tiles": tiles}, TABLE)

    for each in (batch(*[1] * 200), batch(20), batch(1, 1, 18), batch(*[1] * 30, 170), batch(512)):
        executor.forward(each)

    assert [200, 20, 20] == panels.sizes
    assert [200, 512] == tiles.sizes


def test_every_way_forgets_an_adapter_and_the_usual_one_says_what_is_compiled() -> None:
    panels, tiles = Recorder("layers"), Recorder()
    executor = MeasuredExecutor({"panels": panels, "tiles": tiles}, TABLE)
    adapter = LoraAdapter("a", {})

    executor.forget_adapter(adapter)

    assert ([adapter], [adapter]) == (panels.forgotten, tiles.forgotten)
    assert "layers" == executor.compiled


def test_the_table_says_for_each_step_what_it_takes_and_by_which_way() -> None:
    described = {(each.kind, each.tokens): each for each in TABLE.describe(["panels", "tiles"])}

    assert 4 == len(described)
    assert "tiles" == described["prompt", 512].way
    assert {"panels": 500, "tiles": 250} == described["prompt", 512].milliseconds
    assert "prompt 512: tiles 250 ms; panels 500 ms" == str(described["prompt", 512])
