// Low-rank adapters (LoRA): what single tokens get in addition to a linear layer, out += (x down^T) up.
//
// Tokens with the same adapter share the loads of its weights.  Every sum is accumulated in one order, so that the bits
// of a token's result do not depend on the batch.

#pragma once

#include "gemm_packed.h"

namespace {

// The types that adapters are stored in, whatever the model's is; Python mirrors these numbers.
enum LoraType : int64_t { LORA_FLOAT32, LORA_BFLOAT16, LORA_FLOAT16 };

// What an adapter adds to one linear layer; Python mirrors this structure.
struct LoraWeights {
    // (rank, inputs), and (outputs / LANES, rank, LANES): both are read from end to end, however the outputs are
    // divided.  Null with rank 0.
    const void *down, *up;
    int64_t rank;
    LoraType type;
    // Factor of the product.
    float scale;
};

// Call `body(down, up)` with pointers to the type that the weights are stored in.
template <class Body>
void with_lora_type(const LoraWeights& weights, Body body) {
    switch (weights.type) {
        case LORA_FLOAT32: return body((const float*)weights.down, (const float*)weights.up);
        case LORA_BFLOAT16: return body((const bfloat16*)weights.down, (const bfloat16*)weights.up);
        case LORA_FLOAT16:
#if defined(LLMK_HAVE_FLOAT16)
            return body((const float16*)weights.down, (const float16*)weights.up);
#else
            return;
#endif
    }
}

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

// reduced (TOKENS, RANKS) = x (TOKENS, depth) times some rows of `down`, times `scale`
template <int TOKENS, int RANKS, class Input, class Weight>
inline void reduce_kernel(const Input* x, const Weight* rows, int64_t depth, float scale, float* reduced,
                          int64_t stride) {
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
        for (int rank = 0; rank < RANKS; rank++)
            reduced[token * stride + rank] = reduce_sum(sums[token][rank]) * scale;
}

template <int TOKENS, int RANKS, class Input>
void reduce_ranks_of(const Input* x, const LoraWeights& weights, int64_t depth, float* reduced, int64_t stride) {
    with_lora_type(weights, [&](auto* down, auto*) {
        int64_t rank = 0;
        for (; rank + RANKS <= weights.rank; rank += RANKS)
            reduce_kernel<TOKENS, RANKS>(x, down + rank * depth, depth, weights.scale, reduced + rank, stride);
        for (; rank < weights.rank; rank++)
            reduce_kernel<TOKENS, 1>(x, down + rank * depth, depth, weights.scale, reduced + rank, stride);
    });
}

// reduced (tokens, rank), rows of which are `stride` apart, = scale x (tokens, depth) down^T
template <class Input>
void reduce_ranks(const Input* x, const LoraWeights& weights, int64_t depth, int64_t tokens, float* reduced,
                  int64_t stride) {
    if (tokens == LORA_TOKENS) return reduce_ranks_of<LORA_TOKENS, 2>(x, weights, depth, reduced, stride);
    int64_t token = 0;
    for (; token + 2 <= tokens; token += 2)
        reduce_ranks_of<2, 4>(x + token * depth, weights, depth, reduced + token * stride, stride);
    if (token < tokens) reduce_ranks_of<1, 4>(x + token * depth, weights, depth, reduced + token * stride, stride);
}

// Prefetch the `up` weights of some outputs.
inline void prefetch_up(const LoraWeights& weights, int64_t first, int64_t width) {
    constexpr int64_t CACHE_LINE = 64;
    with_lora_type(weights, [&](auto*, auto* up) {
        const char* from = (const char*)(up + first * weights.rank);
        const char* end = (const char*)(up + (first + width) * weights.rank);
        for (; from < end; from += CACHE_LINE) __builtin_prefetch(from);
    });
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
        for (int vector = 0; vector < VECTORS; vector++) weights[vector] = load(up + (vector * rank + row) * LANES);
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

template <int TOKENS, int VECTORS>
void expand_ranks_of(const float* reduced, int64_t reduced_stride, const LoraWeights& weights, int64_t first,
                     int64_t width, LoraOutput out) {
    with_lora_type(weights, [&](auto*, auto* up) {
        auto* from = up + first * weights.rank;
        int64_t at = 0;
        for (; at + VECTORS * LANES <= width; at += VECTORS * LANES)
            expand_kernel<TOKENS, VECTORS>(reduced, reduced_stride, from + at * weights.rank, weights.rank,
                                           {out.at + at, out.stride});
        if constexpr (VECTORS > 2) {
            for (; at + 2 * LANES <= width; at += 2 * LANES)
                expand_kernel<TOKENS, 2>(reduced, reduced_stride, from + at * weights.rank, weights.rank,
                                         {out.at + at, out.stride});
        }
        for (; at < width; at += LANES)
            expand_kernel<TOKENS, 1>(reduced, reduced_stride, from + at * weights.rank, weights.rank,
                                     {out.at + at, out.stride});
    });
}

// out (tokens, width) += reduced (tokens, rank) up, of the outputs from `first` on; both are multiples of LANES.
inline void expand_ranks(const float* reduced, int64_t reduced_stride, const LoraWeights& weights, int64_t first,
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
