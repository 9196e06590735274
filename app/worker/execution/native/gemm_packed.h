// GEMM of activations with the packed weights of a linear layer: out (tokens, outputs) = x (tokens, depth) W^T.
//
// Packed layout.  The weights of NR = 16 consecutive outputs form a panel, in which they lie in the order in which they
// are read: all outputs of the first input, then all of the second.  Outputs are padded with zeros to an even number of
// panels.  So few tokens take as long as reading the weights once, and many as long as the arithmetic.
//
//   float, float16, int8_t: (panels, depth, NR)
//
//                  panel 0: outputs 0..15                        panel 1: outputs 16..31
//                 +------+------+------+-----+------+           +------+------+-----+------+
//       input 0   | W0,0 | W1,0 | W2,0 | ... | W15,0|           |W16,0 |W17,0 | ... |W31,0 |
//       input 1   | W0,1 | W1,1 | W2,1 | ... | W15,1|           |W16,1 |W17,1 | ... |W31,1 |
//       ...       |                                 |           |                          |
//       depth-1   | W0,d | W1,d | W2,d | ... | W15,d|           |W16,d |W17,d | ... |W31,d |
//                 +------+------+------+-----+------+           +------+------+-----+------+
//                 one line is one read of 16 weights; panel 1 begins depth * NR elements after panel 0
//
//   bfloat16: (panels, depth / 2, NR, 2), two inputs of an output side by side, as VDPBF16PS multiplies them
//
//                 +-------------+-------------+-----+---------------+
//       inputs 0,1| W0,0   W0,1 | W1,0   W1,1 | ... | W15,0   W15,1 |
//       inputs 2,3| W0,2   W0,3 | W1,2   W1,3 | ... | W15,2   W15,3 |
//                 +-------------+-------------+-----+---------------+
//
//   int8_t has a float32 scale for each output beside its panels, scales (outputs,): W = int8 * scale, applied once to
//   the finished sum.  Activations are float32, with bfloat16 weights bfloat16.

#pragma once

#include <algorithm>
#include <type_traits>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "bf16.h"
#include "simd.h"

namespace {

// Tokens whose activations stay in the second-level cache while a panel is multiplied with them.
constexpr int64_t TOKEN_BLOCK = 128;
// In weights: each is read once in a forward pass, from beyond any cache.
constexpr int64_t PREFETCH_DISTANCE = 64 * NR;
// Chunks that each thread's share of the panels is divided into for few tokens, so that a thread which another process
// delays leaves the rest to others.
constexpr int64_t CHUNKS_PER_THREAD = 6;

inline f32x8 load(const int8_t* from) {
#if defined(__AVX2__)
    // GCC 12 compiles the portable way to one conversion for each element.
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t i8x8 __attribute__((vector_size(LANES)));
    i8x8 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, i32x8), f32x8);
#endif
}

#if defined(__F16C__) || defined(__aarch64__)
#define LLMK_HAVE_FLOAT16 1
// A storage type of weights; the arithmetic is float32.
struct float16 {
    uint16_t bits;
};

inline f32x8 load(const float16* from) {
#if defined(__F16C__)
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    typedef __fp16 f16x8 __attribute__((vector_size(LANES * sizeof(__fp16))));
    f16x8 halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, f32x8);
#endif
}
#endif

// Microkernel: sums (TOKENS, PANELS * NR) = x (TOKENS, depth) times some panels, `panel_stride` elements apart.
//
// Every sum is accumulated in the order of the inputs, so that the bits of a token's result do not depend on the batch.
// Few tokens take two panels at a time: one has too few accumulators to hide the latency of multiply-add.
template <int TOKENS, int PANELS, class Weight>
inline void gemm_microkernel(const float* x, const Weight* panels, int64_t panel_stride, int64_t depth, float* sums) {
    f32x8 accumulators[TOKENS][PANELS][2] = {};
    for (int64_t k = 0; k < depth; k++)
        for (int panel = 0; panel < PANELS; panel++) {
            const Weight* weights = panels + panel * panel_stride + k * NR;
            __builtin_prefetch(weights + PREFETCH_DISTANCE);
            const f32x8 left = load(weights), right = load(weights + LANES);
            for (int token = 0; token < TOKENS; token++) {
                const float factor = x[token * depth + k];
                accumulators[token][panel][0] += left * factor;
                accumulators[token][panel][1] += right * factor;
            }
        }
    std::memcpy(sums, accumulators, sizeof accumulators);
}

// sums (tokens, 2 * NR) of two panels for up to MR tokens.  Not inlined: one copy of each microkernel is enough.
template <class Weight>
__attribute__((noinline)) void multiply_panels(const float* x, const Weight* panels, int64_t panel_stride,
                                               int64_t depth, int64_t tokens, float* sums) {
    switch (tokens) {
        case 1: return gemm_microkernel<1, 2>(x, panels, panel_stride, depth, sums);
        case 2: return gemm_microkernel<2, 2>(x, panels, panel_stride, depth, sums);
        case 3: return gemm_microkernel<3, 2>(x, panels, panel_stride, depth, sums);
    }
    for (int panel = 0; panel < 2; panel++) {
        alignas(64) float half[MR * NR];
        const Weight* from = panels + panel * panel_stride;
        switch (tokens) {
            case 4: gemm_microkernel<4, 1>(x, from, panel_stride, depth, half); break;
            case 5: gemm_microkernel<5, 1>(x, from, panel_stride, depth, half); break;
            default: gemm_microkernel<MR, 1>(x, from, panel_stride, depth, half);
        }
        for (int64_t token = 0; token < tokens; token++)
            std::memcpy(sums + (2 * token + panel) * NR, half + token * NR, sizeof half / MR);
    }
}

// Both panels at a time where the accumulators fit the registers.
template <int TOKENS>
inline void multiply_panels_of(const bfloat16* x, const bfloat16* panels, int64_t panel_stride, int64_t depth,
                               float* sums) {
    constexpr int64_t PAIR = 2 * NR;
    if constexpr (2 * TOKENS <= MAX_ACCUMULATORS) {
        gemm_microkernel<TOKENS, 2, false>(x, depth, 2, panels, PAIR, panel_stride, sums, PAIR, NR, depth / 2,
                                           PREFETCH_DISTANCE);
    } else {
        gemm_microkernel<TOKENS, 1, false>(x, depth, 2, panels, PAIR, 0, sums, PAIR, 0, depth / 2, PREFETCH_DISTANCE);
        gemm_microkernel<TOKENS, 1, false>(x, depth, 2, panels + panel_stride, PAIR, 0, sums + NR, PAIR, 0, depth / 2,
                                           PREFETCH_DISTANCE);
    }
}

// Turn the run-time number of tokens, up to MAX_TOKENS, into a template argument.
template <int MAX_TOKENS>
void dispatch_tokens(const bfloat16* x, const bfloat16* panels, int64_t panel_stride, int64_t depth, int64_t tokens,
                     float* sums) {
    if constexpr (MAX_TOKENS > 1) {
        if (tokens < MAX_TOKENS)
            return dispatch_tokens<MAX_TOKENS - 1>(x, panels, panel_stride, depth, tokens, sums);
    }
    multiply_panels_of<MAX_TOKENS>(x, panels, panel_stride, depth, sums);
}

// The activation type that goes with a type of weights, and the tokens of one call of the microkernel.
template <class Weight>
struct WeightTraits {
    typedef float activation;
    static constexpr int64_t max_tokens = MR;
};

template <>
struct WeightTraits<bfloat16> {
    typedef bfloat16 activation;
    static constexpr int64_t max_tokens = MAX_ACCUMULATORS >= 24 ? 12 : MR;
};

__attribute__((noinline)) inline void multiply_panels(const bfloat16* x, const bfloat16* panels, int64_t panel_stride,
                                                      int64_t depth, int64_t tokens, float* sums) {
    dispatch_tokens<WeightTraits<bfloat16>::max_tokens>(x, panels, panel_stride, depth, tokens, sums);
}

// Call `body(token, count)` for groups of nearly equal size, up to MAX_TOKENS, of the tokens from `begin` to `end`.
template <int64_t MAX_TOKENS, class Body>
void for_token_groups(int64_t begin, int64_t end, Body body) {
    for (int64_t groups = (end - begin + MAX_TOKENS - 1) / MAX_TOKENS; groups > 0; groups--) {
        const int64_t count = (end - begin + groups - 1) / groups;
        body(begin, count);
        begin += count;
    }
}

// Parallel loop over (token block, panel pair) tiles, which calls `body(pair, first token, end token)`; must be called
// by every thread of the parallel region and ends with a barrier.  Few tokens are bound by memory: each thread gets
// long stretches of weights.  Many are bound by arithmetic: tiles are handed out one by one, so that no thread waits
// long.
template <class Body>
void parallel_for_tiles(int64_t pairs, int64_t tokens, int threads, Body body) {
    const int64_t chunk = tokens > 2 * MR ? 1 : std::max<int64_t>(1, pairs / (CHUNKS_PER_THREAD * threads));
    const int64_t blocks = (tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t tile = 0; tile < blocks * pairs; tile++) {
        const int64_t block = tile / pairs;
        body(tile % pairs, block * tokens / blocks, (block + 1) * tokens / blocks);
    }
}

// Packed weights of a linear layer; Python mirrors this structure.
template <class Weight>
struct PackedWeights {
    // An even number of panels.
    const Weight* panels;
    // (outputs,) each, or null.
    const float *scales, *bias;

    float apply_scale_and_bias(float sum, int64_t output) const {
        return (scales ? scales[output] * sum : sum) + (bias ? bias[output] : 0.0f);
    }

    f32x8 apply_scale_and_bias(f32x8 sums, int64_t output) const {
        if (scales) sums *= load(scales + output);
        return bias ? sums + load(bias + output) : sums;
    }
};

// Some results of a linear layer before they are stored: (tokens, outputs), rows of which are `stride` apart.
struct LinearTile {
    int64_t first_token, tokens, first_output, outputs;
    float* sums;
    int64_t stride;
};

// What else is done to the results of a linear layer: nothing.
struct NoEpilogue {
    void prefetch(const LinearTile&) const {}
    void apply(const LinearTile&) const {}
};

// A linear layer: out (tokens, outputs) = x (tokens, depth) W^T + bias, or out += that with ACCUMULATE.  `epilogue` may
// change the results of a tile before they are stored or added, and is told of the tile before it is computed.  Must be
// called by every thread of a parallel region and ends with a barrier.
template <bool ACCUMULATE, class Weight, class Output, class Epilogue = NoEpilogue>
void linear(const typename WeightTraits<Weight>::activation* x, PackedWeights<Weight> weights, int64_t depth,
            int64_t outputs, int64_t tokens, Output* out, int threads, Epilogue epilogue = {}) {
    static_assert(!ACCUMULATE || std::is_same_v<Output, float>, "residual sums stay in float32");
    constexpr int64_t PAIR = 2 * NR, MAX_TOKENS = WeightTraits<Weight>::max_tokens;
    parallel_for_tiles((outputs + PAIR - 1) / PAIR, tokens, threads, [&](int64_t pair, int64_t begin, int64_t end) {
        const int64_t first = pair * PAIR, width = std::min(PAIR, outputs - first);
        for_token_groups<MAX_TOKENS>(begin, end, [&](int64_t token, int64_t count) {
            alignas(64) float sums[MAX_TOKENS * PAIR];
            const LinearTile tile{token, count, first, width, sums, PAIR};
            epilogue.prefetch(tile);
            multiply_panels(x + token * depth, weights.panels + first * depth, NR * depth, depth, count, sums);
            for (int64_t row = 0; row < count; row++)
                for (int64_t lane = 0; lane < width; lane++)
                    sums[row * PAIR + lane] = weights.apply_scale_and_bias(sums[row * PAIR + lane], first + lane);
            epilogue.apply(tile);
            for (int64_t row = 0; row < count; row++) {
                Output* to = out + (token + row) * outputs + first;
                for (int64_t lane = 0; lane < width; lane++) {
                    const float result = sums[row * PAIR + lane];
                    if constexpr (std::is_same_v<Output, bfloat16>)
                        to[lane] = to_bfloat16(result);
                    else
                        to[lane] = (ACCUMULATE ? to[lane] : 0.0f) + result;
                }
            }
        });
    });
}

}  // namespace
