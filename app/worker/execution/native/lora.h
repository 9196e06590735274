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
    // divided.  In bfloat16 `up` is (outputs / LANES, rank / 2, LANES, 2).  Null with rank 0.
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

inline void set(float& to, float value) { to = value; }
inline void set(bfloat16& to, float value) { to = to_bfloat16(value); }

// reduced (TOKENS, RANKS) = x (TOKENS, depth) times some rows of `down`, times `scale`
template <int TOKENS, int RANKS, class Input, class Weight>
inline void reduce_kernel(const Input* x, const Weight* rows, int64_t depth, float scale, Input* reduced,
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
            for (int rank = 0; rank < RANKS; rank++)
                sums[token][rank] = multiply_add(vector, weights[rank], sums[token][rank]);
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int rank = 0; rank < RANKS; rank++)
            set(reduced[token * stride + rank], reduce_sum(sums[token][rank]) * scale);
}

#if defined(LLMK_HAVE_AVX512_BF16)
// The same by pairs, as the layers' own weights are multiplied (VDPBF16PS).
template <int TOKENS, int RANKS>
inline void reduce_kernel(const bfloat16* x, const bfloat16* rows, int64_t depth, float scale, bfloat16* reduced,
                          int64_t stride) {
    constexpr int64_t WIDE = 4 * LANES;
    __m512 sums[TOKENS][RANKS] = {};
    for (int64_t at = 0; at < depth; at += WIDE) {
        const __mmask32 mask = at + WIDE <= depth ? ~0u : (1u << (depth - at)) - 1;
        __m512bh weights[RANKS];
        for (int rank = 0; rank < RANKS; rank++) {
            __builtin_prefetch(rows + (RANKS + rank) * depth + at);
            weights[rank] = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows + rank * depth + at);
        }
        for (int token = 0; token < TOKENS; token++) {
            const __m512bh vector = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + token * depth + at);
            for (int rank = 0; rank < RANKS; rank++)
                sums[token][rank] = _mm512_dpbf16_ps(sums[token][rank], vector, weights[rank]);
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int rank = 0; rank < RANKS; rank++) {
            f32x8 halves[2];
            std::memcpy(halves, &sums[token][rank], sizeof halves);
            set(reduced[token * stride + rank], reduce_sum(halves[0] + halves[1]) * scale);
        }
}
#endif

template <int TOKENS, int RANKS, class Input>
void reduce_ranks_of(const Input* x, const LoraWeights& weights, int64_t depth, Input* reduced, int64_t stride) {
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
void reduce_ranks(const Input* x, const LoraWeights& weights, int64_t depth, int64_t tokens, Input* reduced,
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

inline float to_float(float value) { return value; }

// sums + first weights of the pairs * factors[0] + second weights * factors[1]
inline f32x8 accumulate_pairs(f32x8 sums, u32x8 pairs, const float* factors) {
    const u32x8 low = pairs << 16, high = pairs & 0xffff0000u;
    f32x8 firsts, seconds;
    std::memcpy(&firsts, &low, sizeof firsts);
    std::memcpy(&seconds, &high, sizeof seconds);
    return multiply_add(seconds, broadcast(factors[1]), multiply_add(firsts, broadcast(factors[0]), sums));
}

inline f32x8 accumulate_pairs(f32x8 sums, u32x8 pairs, const bfloat16* factors) {
#if defined(LLMK_HAVE_AVX512_BF16)
    return (f32x8)_mm256_dpbf16_ps((__m256)sums, (__m256bh)pairs, (__m256bh)_mm256_set1_epi32(load_pair(factors)));
#else
    const float floats[] = {to_float(factors[0]), to_float(factors[1])};
    return accumulate_pairs(sums, pairs, floats);
#endif
}

// sums (TOKENS, VECTORS * LANES) += reduced (TOKENS, rank) times some outputs of `up`
template <int TOKENS, int VECTORS, class Input, class Weight>
inline void accumulate_ranks(const Input* reduced, int64_t reduced_stride, const Weight* up, int64_t rank,
                             f32x8 (&sums)[TOKENS][VECTORS]) {
    for (int64_t row = 0; row < rank; row++) {
        f32x8 weights[VECTORS];
        for (int vector = 0; vector < VECTORS; vector++) weights[vector] = load(up + (vector * rank + row) * LANES);
        for (int token = 0; token < TOKENS; token++) {
            const f32x8 factor = broadcast(to_float(reduced[token * reduced_stride + row]));
            for (int vector = 0; vector < VECTORS; vector++)
                sums[token][vector] = multiply_add(weights[vector], factor, sums[token][vector]);
        }
    }
}

// Two ranks at a time.
template <int TOKENS, int VECTORS, class Input>
inline void accumulate_ranks(const Input* reduced, int64_t reduced_stride, const bfloat16* up, int64_t rank,
                             f32x8 (&sums)[TOKENS][VECTORS]) {
    for (int64_t row = 0; row < rank; row += 2) {
        u32x8 pairs[VECTORS];
        for (int vector = 0; vector < VECTORS; vector++)
            std::memcpy(&pairs[vector], up + (vector * rank + row) * LANES, sizeof pairs[vector]);
        for (int token = 0; token < TOKENS; token++) {
            const Input* factors = reduced + token * reduced_stride + row;
            for (int vector = 0; vector < VECTORS; vector++)
                sums[token][vector] = accumulate_pairs(sums[token][vector], pairs[vector], factors);
        }
    }
}

// The same for sums in memory.
template <int TOKENS, int VECTORS, class Input, class Weight>
inline void expand_kernel(const Input* reduced, int64_t reduced_stride, const Weight* up, int64_t rank,
                          LoraOutput out) {
    f32x8 sums[TOKENS][VECTORS];
    for (int token = 0; token < TOKENS; token++)
        for (int vector = 0; vector < VECTORS; vector++)
            sums[token][vector] = load(out.at + token * out.stride + vector * LANES);
    accumulate_ranks<TOKENS, VECTORS>(reduced, reduced_stride, up, rank, sums);
    for (int token = 0; token < TOKENS; token++)
        for (int vector = 0; vector < VECTORS; vector++)
            store(out.at + token * out.stride + vector * LANES, sums[token][vector]);
}

template <int TOKENS, int VECTORS, class Input>
void expand_ranks_of(const Input* reduced, int64_t reduced_stride, const LoraWeights& weights, int64_t first,
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
template <class Input>
void expand_ranks(const Input* reduced, int64_t reduced_stride, const LoraWeights& weights, int64_t first,
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
