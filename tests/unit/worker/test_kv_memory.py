"""Memory of the KV cache: what may be taken, and when it is."""

from pathlib import Path

import psutil
import pytest
import torch

from app.worker.execution.kv_cache import KVCache, TorchBlockCopier
from app.worker.execution.native.block_copier import NativeBlockCopier
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.attention import TorchAttention
from app.worker.loading import kv_memory
from app.worker.loading.kv_memory import cgroup_bytes, kv_cache_bytes

MB = 2**20


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("max", "5000", 2**63), ("8000", "5000", 3000), ("8000", "9000", 0), (None, None, 2**63)],
    ids=["no limit", "a limit", "over it", "no such files"],
)
def test_a_containers_limit_bounds_the_kv_cache(tmp_path: Path, limit: str | None, used: str, left: int) -> None:
    """What the container may still take counts, however much the machine has."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")

    assert left == cgroup_bytes(tmp_path)


def test_the_kv_cache_may_take_a_share_of_what_is_free() -> None:
    """Not all of it, and something."""
    assert 0 < kv_cache_bytes("cpu") < psutil.virtual_memory().total


def test_what_a_step_takes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left for the KV cache where a step takes it all."""
    monkeypatch.setattr(kv_memory, "free_bytes", lambda device: 1000)

    assert [900, 540, 0] == [kv_cache_bytes("cuda", step_bytes=each) for each in (0, 400, 2000)]


def test_slots_take_memory_only_as_they_are_written() -> None:
    """512 MB of keys and values cost a few until tokens are written, and each slot starts with zeros."""
    slots, length, size = 64, 16384, 64
    cache = KVCache(slots, length, "cpu", TorchAttention())
    before = psutil.Process().memory_info().rss

    cache.pack([Segment(3, 5, [1])], [True])
    keys, values = cache.update(torch.ones(1, 1, 1, size), torch.ones(1, 1, 1, size), 0)

    assert (slots, 1, length, size) == keys.shape == values.shape
    assert 512 * MB == 2 * keys.nbytes
    assert psutil.Process().memory_info().rss - before < 32 * MB
    assert [0.0, 1.0, 0.0] == keys[3, 0, 4:7, 0].tolist()


@pytest.fixture(params=["torch", "native"])
def copier(request: pytest.FixtureRequest) -> type[TorchBlockCopier | NativeBlockCopier]:
    if request.param == "torch":
        return TorchBlockCopier
    request.getfixturevalue("compiler")
    return NativeBlockCopier


def cache_with_blocks(copier: type[TorchBlockCopier | NativeBlockCopier], length: int) -> KVCache:
    """Return three slots of two layers, whose heads differ in number and size and keys from values, and 9 blocks."""
    cache = KVCache(3, length, "cpu", TorchAttention())
    cache.pack([Segment(0, 0, [1])], [True])
    for layer, (heads, size, dtype) in enumerate([(2, 4, torch.float32), (3, 6, torch.bfloat16)]):
        cache.update(torch.ones(1, heads, 1, size, dtype=dtype), torch.ones(1, heads, 1, size + 2, dtype=dtype), layer)
    cache.make_block_copier = copier
    assert cache.add_prefix_cache(9 * 8 * cache.bytes_per_token, 8) == 9
    return cache


@pytest.mark.parametrize("length", [16, 20, 23])
@pytest.mark.parametrize("start", [0, 8])
def test_blocks_hold_what_they_were_given_up_to_the_end_of_a_slot(
    copier: type[TorchBlockCopier | NativeBlockCopier], length: int, start: int
) -> None:
    """Also where a slot has no room for the whole last block; other slots and blocks stay as they are."""
    cache = cache_with_blocks(copier, length)
    storage = [*cache.layer(0), *cache.layer(1)]
    for each in storage:
        each.copy_(torch.randn_like(each))
    expected = [each.clone() for each in storage]
    first, others = [5, 2, 7], [6, 1]

    cache.save_prefix(0, 0, first)
    cache.save_prefix(1, start, others)
    for each in storage:
        each[0], each[2] = 0, 0
    cache.restore_prefix(first, 0)
    cache.restore_prefix([*first[: start // 8], *others][:3], 2)

    for found, wanted in zip(storage, expected, strict=True):
        assert found[:2].equal(wanted[:2])
        assert found[2, :, start : start + 16].equal(wanted[1, :, start : start + 16])
        assert found[2, :, :start].equal(wanted[0, :, :start])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("slot", "start", "block"), [(3, 0, 0), (-1, 0, 0), (0, 21, 0), (0, -1, 0), (0, 0, 9), (0, 0, -1)]
)
def test_the_native_copier_writes_nowhere_else(slot: int, start: int, block: int) -> None:
    """Whatever it is told: an index that is wrong would overwrite memory of the process."""
    cache = cache_with_blocks(NativeBlockCopier, length=20)
    with pytest.raises(IndexError, match="outside"):
        cache.save_prefix(slot, start, [block])
