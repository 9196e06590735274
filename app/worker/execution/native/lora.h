// Low-rank adapters (LoRA): what single tokens get in addition to a linear layer, out += (x down^T) up.
//
// Tokens with the same adapter share the loads of its weights.  Every sum is accumulated in one order, so that the bits
// of a token's result do not depend on the batch.

#pragma once

#include <algorithm>

#include "bf16.h"
#include "simd.h"

namespace {

// What an adapter adds to one linear layer; Python mirrors this structure.
template <class Weight>
struct LoraWeights {
    // (rank, inputs), and (outputs / LANES, rank, LANES) with the adapter's scale: both are read from end to end, however
    // the outputs are divided.  Null with rank 0.
    const Weight *down, *up;
    int64_t rank;
};

// sums + a * b, rounded once wherever the processor can.  GCC may widen products of several vectors to one and leaves
// those outside of a fused operation: the bits would depend on how many tokens a kernel has.
inline f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 sums) {
#if defined(__FMA__) && defined(__AVX2__)
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums);
#else
    return sums + a * b;
#endif
}

// Consecutive tokens of one adapter that are computed together.
constexpr int64_t LORA_TOKENS = 4;

// reduced (TOKENS, RANKS) = x (TOKENS, depth) times some rows of `down`
template <int TOKENS, int RANKS, class Weight>
inline void reduce_kernel(const Weight* x, const Weight* rows, int64_t depth, float* reduced, int64_t stride) {
    f32x8 sums[TOKENS][RANKS] = {};
    for (int64_t at = 0; at < depth; at += LANES) {
        f32x8 weights[RANKS];
        for (int rank = 0; rank < RANKS; rank++) {
            // The rows of the next call: a decode step takes as long as reading the weights.
            __builtin_prefetch(rows + (RANKS + rank) * depth + at);
            weights[rank] = load(rows + rank * depth + at);
        }
        for (int token = 0; token < TOKENS; token++) {
            const f32x8 vector = load(x + token * depth + at);
            for (int rank = 0; rank < RANKS; rank++) sums[token][rank] = multiply_add(vector, weights[rank], sums[token][rank]);
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int rank = 0; rank < RANKS; rank++) reduced[token * stride + rank] = reduce_sum(sums[token][rank]);
}

template <int TOKENS, int RANKS, class Weight>
void reduce_ranks_of(const Weight* x, LoraWeights<Weight> weights, int64_t depth, float* reduced, int64_t stride) {
    int64_t rank = 0;
    for (; rank + RANKS <= weights.rank; rank += RANKS)
        reduce_kernel<TOKENS, RANKS>(x, weights.down + rank * depth, depth, reduced + rank, stride);
    for (; rank < weights.rank; rank++)
        reduce_kernel<TOKENS, 1>(x, weights.down + rank * depth, depth, reduced + rank, stride);
}

// reduced (tokens, rank), rows of which are `stride` apart, = x (tokens, depth) down^T
template <class Weight>
void reduce_ranks(const Weight* x, LoraWeights<Weight> weights, int64_t depth, int64_t tokens, float* reduced,
                  int64_t stride) {
    if (tokens == LORA_TOKENS) return reduce_ranks_of<LORA_TOKENS, 2>(x, weights, depth, reduced, stride);
    int64_t token = 0;
    for (; token + 2 <= tokens; token += 2)
        reduce_ranks_of<2, 4>(x + token * depth, weights, depth, reduced + token * stride, stride);
    if (token < tokens) reduce_ranks_of<1, 4>(x + token * depth, weights, depth, reduced + token * stride, stride);
}

// A view of some tokens' outputs, rows of which are `stride` apart.
struct LoraOutput {
    float* at;
    int64_t stride;
};

// out (TOKENS, VECTORS * LANES) += reduced (TOKENS, rank) times some outputs of `up`
template <int TOKENS, int VECTORS, class Weight>
inline void expand_kernel(const float* reduced, int64_t reduced_stride, const Weight* up, int64_t rank,
                          LoraOutput out) {
    f32x8 sums[TOKENS][VECTORS];
    for (int token = 0; token < TOKENS; token++)
        for (int vector = 0; vector < VECTORS; vector++)
            sums[token][vector] = load(out.at + token * out.stride + vector * LANES);
    for (int64_t row = 0; row < rank; row++) {
        f32x8 weights[VECTORS];
        for (int vector = 0; vector < VECTORS; vector++) {
            __builtin_prefetch(up + ((VECTORS + vector) * rank + row) * LANES);
            weights[vector] = load(up + (vector * rank + row) * LANES);
        }
        for (int token = 0; token < TOKENS; token++) {
            const f32x8 factor = broadcast(reduced[token * reduced_stride + row]);
            for (int vector = 0; vector < VECTORS; vector++)
                sums[token][vector] = multiply_add(weights[vector], factor, sums[token][vector]);
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int vector = 0; vector < VECTORS; vector++)
            store(out.at + token * out.stride + vector * LANES, sums[token][vector]);
}

template <int TOKENS, int VECTORS, class Weight>
void expand_ranks_of(const float* reduced, int64_t reduced_stride, LoraWeights<Weight> weights, int64_t first,
                     int64_t width, LoraOutput out) {
    const Weight* up = weights.up + first * weights.rank;
    int64_t at = 0;
    for (; at + VECTORS * LANES <= width; at += VECTORS * LANES)
        expand_kernel<TOKENS, VECTORS>(reduced, reduced_stride, up + at * weights.rank, weights.rank,
                                       {out.at + at, out.stride});
    for (; at < width; at += LANES)
        expand_kernel<TOKENS, 1>(reduced, reduced_stride, up + at * weights.rank, weights.rank,
                                 {out.at + at, out.stride});
}

// out (tokens, width) += reduced (tokens, rank) up, of the outputs from `first` on; both are multiples of LANES.
template <class Weight>
void expand_ranks(const float* reduced, int64_t reduced_stride, LoraWeights<Weight> weights, int64_t first,
                  int64_t width, int64_t tokens, LoraOutput out) {
    if (tokens == LORA_TOKENS)
        return expand_ranks_of<LORA_TOKENS, 2>(reduced, reduced_stride, weights, first, width, out);
    int64_t token = 0;
    for (; token + 2 <= tokens; token += 2)
        expand_ranks_of<2, 4>(reduced + token * reduced_stride, reduced_stride, weights, first, width,
                              {out.at + token * out.stride, out.stride});
    if (token < tokens)
        expand_ranks_of<1, 4>(reduced + token * reduced_stride, reduced_stride, weights, first, width,
                              {out.at + token * out.stride, out.stride});
}

}  // namespace
