"""Triton's kernels of attention split over keys; `split_kv_attention.py` launches them.

Written in Triton's subset of Python: constants in capitals, and no types but theirs.
"""

import triton
import triton.language as tl


@triton.jit
def _visible(positions, row, WINDOW: tl.constexpr):
    """Return the first key that the token of a row sees, and the one after its last."""
    end = tl.load(positions + row).to(tl.int32) + 1
    first = end * 0
    if WINDOW is not None:
        first = tl.maximum(end - WINDOW, 0)
    return first, end


@triton.jit
def _keys_of_part(first, end, parts, BLOCK_KEYS: tl.constexpr):
    """Return how many keys each part has, in whole blocks; there may be none left for the last parts."""
    return tl.cdiv(tl.cdiv(end - first, parts), BLOCK_KEYS) * BLOCK_KEYS


# A static batch's positions and slots are aligned for some numbers of rows only: one kernel for all of them.
@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def attend_part(
    query,
    keys,
    values,
    positions,
    slots,
    found,
    sums,
    scale,
    query_row,
    query_head,
    key_slot,
    key_head,
    key_place,
    value_slot,
    value_head,
    value_place,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Attend the query heads of one KV head of one row to a part of the keys that the row sees.

    Writes `found`, (rows, heads, parts, value size), and `sums`, (rows, heads, parts), of parts that have keys.
    """
    row, kv_head, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    first, end = _visible(positions, row, WINDOW)
    part_keys = _keys_of_part(first, end, parts, BLOCK_KEYS)
    begin = first + part * part_keys
    end = tl.minimum(begin + part_keys, end)
    if begin < end:
        # 64 bits: all slots together have more numbers than 32 count.
        slot, wide_head = tl.load(slots + row).to(tl.int64), kv_head.to(tl.int64)
        key_head_at = keys + slot * key_slot + wide_head * key_head
        value_head_at = values + slot * value_slot + wide_head * value_head
        member, key_dim, value_dim = tl.arange(0, GROUP_BLOCK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
        head = kv_head * GROUP + member
        q = tl.load(
            query + row * query_row + head[:, None] * query_head + key_dim[None, :],
            mask=(member < GROUP)[:, None] & (key_dim < KEY_SIZE)[None, :],
            other=0.0,
        )
        top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        out = tl.zeros((GROUP_BLOCK, VALUE_BLOCK), tl.float32)
        for place in range(begin, end, BLOCK_KEYS):
            index = place + tl.arange(0, BLOCK_KEYS)
            k = tl.load(
                key_head_at + index[:, None] * key_place + key_dim[None, :],
                mask=(index < end)[:, None] & (key_dim < KEY_SIZE)[None, :],
                other=0.0,
            )
            v = tl.load(
                value_head_at + index[:, None] * value_place + value_dim[None, :],
                mask=(index < end)[:, None] & (value_dim < VALUE_SIZE)[None, :],
                other=0.0,
            )
            # `ieee` concerns float32, which would be rounded to 10 bits for the matrix instructions.
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP is not None:
                # The hyperbolic tangent, of exponentials that cannot overflow.
                small = tl.exp(tl.abs(scores) * (-2.0 / SOFTCAP))
                bounded = SOFTCAP * (1.0 - small) / (1.0 + small)
                scores = tl.where(scores < 0, -bounded, bounded)
            scores = tl.where((index < end)[None, :], scores, float("-inf"))
            # Each block has a key that is seen, so that this is finite.
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        at = (row * tl.num_programs(1) * GROUP + head) * parts + part
        tl.store(
            found + at[:, None] * VALUE_SIZE + value_dim[None, :],
            out / total[:, None],
            mask=(member < GROUP)[:, None] & (value_dim < VALUE_SIZE)[None, :],
        )
        tl.store(sums + at, top + tl.log(total), mask=member < GROUP)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def combine_parts(
    found,
    sums,
    positions,
    out,
    parts,
    WINDOW: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the weighted mean of what the parts of one row and query head found to `out`, (rows, heads, value size)."""
    row = tl.program_id(0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    first, end = _visible(positions, row, WINDOW)
    part, dim = tl.arange(0, PARTS_BLOCK), tl.arange(0, VALUE_BLOCK)
    used = part * _keys_of_part(first, end, parts, BLOCK_KEYS) < end - first
    logarithms = tl.load(sums + at * parts + part, mask=used, other=float("-inf"))
    weights = tl.exp(logarithms - tl.max(logarithms, 0))
    each = tl.load(
        found + (at * parts + part)[:, None] * VALUE_SIZE + dim[None, :],
        mask=used[:, None] & (dim < VALUE_SIZE)[None, :],
        other=0.0,
    )
    mean = tl.sum(each * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + at * VALUE_SIZE + dim, mean, mask=dim < VALUE_SIZE)
