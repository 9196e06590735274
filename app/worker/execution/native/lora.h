// Low-rank adapters (LoRA): what single tokens get in addition to a linear layer, out += (x down^T) up.
//
// Every sum is accumulated in one order, so that the bits of a token's result do not depend on the batch.

#pragma once

#include <algorithm>

#include "bf16.h"
#include "simd.h"

namespace {

// What an adapter adds to one linear layer; Python mirrors this structure.
template <class Weight>
struct LoraWeights {
    // (rank, inputs), and (rank, outputs) with the adapter's scale; null with rank 0.
    const Weight *down, *up;
    int64_t rank;
};

// Ranks whose dot products share the loads of the activations.
constexpr int64_t RANK_GROUP = 4;

template <int RANKS, class Weight>
inline void dot_products(const Weight* x, const Weight* rows, int64_t depth, float* out) {
    f32x8 sums[RANKS] = {};
    for (int64_t at = 0; at < depth; at += LANES) {
        const f32x8 vector = load(x + at);
        for (int rank = 0; rank < RANKS; rank++) sums[rank] += vector * load(rows + rank * depth + at);
    }
    for (int rank = 0; rank < RANKS; rank++) out[rank] = reduce_sum(sums[rank]);
}

// reduced (rank,) = x (depth,) down^T
template <class Weight>
void reduce_ranks(const Weight* x, LoraWeights<Weight> weights, int64_t depth, float* reduced) {
    int64_t rank = 0;
    for (; rank + RANK_GROUP <= weights.rank; rank += RANK_GROUP)
        dot_products<RANK_GROUP>(x, weights.down + rank * depth, depth, reduced + rank);
    for (; rank < weights.rank; rank++) dot_products<1>(x, weights.down + rank * depth, depth, reduced + rank);
}

// sums + reduced up, of the LANES outputs from `output` on
template <class Weight>
inline f32x8 expand_ranks(f32x8 sums, const float* reduced, LoraWeights<Weight> weights, int64_t outputs,
                          int64_t output) {
    for (int64_t rank = 0; rank < weights.rank; rank++)
        sums += load(weights.up + rank * outputs + output) * reduced[rank];
    return sums;
}

}  // namespace
