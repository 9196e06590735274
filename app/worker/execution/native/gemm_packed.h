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

#include "amx_tiles.h"
#include "bf16.h"
#include "simd.h"
#include "split_tiles.h"
#include "weight_types.h"

namespace {

// Tokens whose activations stay in the second-level cache while a panel is multiplied with them.
constexpr int64_t TOKEN_BLOCK = 128;
// In weights: each is read once in a forward pass, from beyond any cache.
constexpr int64_t PREFETCH_DISTANCE = 64 * NR;
// Chunks that each thread's share of the panels is divided into for few tokens, so that a thread which another process
// delays leaves the rest to others.
constexpr int64_t CHUNKS_PER_THREAD = 6;

// Microkernel: sums (TOKENS, PANELS * NR), rows of which are 2 * NR apart, = x (TOKENS, depth) times some panels, which
// are `panel_stride` elements apart; `ahead` is prefetched.
//
// Every sum is accumulated in the order of the inputs, so that the bits of a token's result do not depend on the batch.
// Few tokens take two panels at a time: one has too few accumulators to hide the latency of multiply-add.
template <int TOKENS, int PANELS, class Weight>
inline void gemm_microkernel(const float* x, const Weight* panels, int64_t panel_stride, int64_t depth, float* sums,
                             Ahead<Weight> ahead) {
    constexpr int VECTORS = PANELS * PANEL_VECTORS, WIDTH = NR / PANEL_VECTORS;
    accumulator_t accumulators[TOKENS][VECTORS] = {};
    RowCursor<TOKENS, float> rows(x, depth);
    for (int64_t k = 0; k < depth; k++, rows.advance(1)) {
        accumulator_t weights[VECTORS];
        for (int panel = 0; panel < PANELS; panel++) {
            __builtin_prefetch(ahead.panel[panel] + k * NR);
            for (int at = 0; at < PANEL_VECTORS; at++)
                weights[panel * PANEL_VECTORS + at] = load_weights(panels + panel * panel_stride + k * NR + at * WIDTH);
        }
        for (int token = 0; token < TOKENS; token++) {
            const float factor = *rows[token];
            for (int at = 0; at < VECTORS; at++) accumulators[token][at] += weights[at] * factor;
        }
    }
    for (int token = 0; token < TOKENS; token++)
        std::memcpy(sums + token * 2 * NR, accumulators[token], sizeof accumulators[token]);
}

// The activation type that goes with a type of weights, the tokens of one call of the microkernel, and how many panels
// times tokens have their accumulators in registers.
template <class Weight>
struct WeightTraits {
    typedef float activation;
    static constexpr int max_accumulators = MAX_VECTORS / PANEL_VECTORS;
    static constexpr int max_tokens = std::min(12, max_accumulators);
};

template <>
struct WeightTraits<bfloat16> {
    typedef bfloat16 activation;
    static constexpr int max_accumulators = MAX_ACCUMULATORS;
    static constexpr int max_tokens = std::min(12, max_accumulators);
};

template <class Weight>
using activation_of = typename WeightTraits<Weight>::activation;

// Whether tiles multiply sums of bfloat16 numbers in place of the activations and weights.
template <class Weight>
constexpr bool is_split = !std::is_same_v<Weight, bfloat16>;

// Some panels for TOKENS tokens.
template <int TOKENS, int PANELS, class Weight>
inline void multiply_some(const activation_of<Weight>* x, const Weight* panels, int64_t panel_stride, int64_t depth,
                           float* sums, Ahead<Weight> ahead) {
    if constexpr (std::is_same_v<Weight, bfloat16>)
        gemm_microkernel<TOKENS, PANELS, false>(x, depth, 2, panels, 2 * NR, panel_stride, sums, 2 * NR, NR, depth / 2,
                                                ahead);
    else
        gemm_microkernel<TOKENS, PANELS>(x, panels, panel_stride, depth, sums, ahead);
}

// sums (tokens, 2 * NR) of two panels for 1 to MAX_TOKENS tokens: turns their number into a template argument.  Both
// panels are multiplied at a time where the accumulators fit the registers.
template <int MAX_TOKENS, class Weight>
inline void dispatch_tokens(const activation_of<Weight>* x, const Weight* panels, int64_t panel_stride, int64_t depth,
                            int64_t tokens, float* sums, Ahead<Weight> ahead) {
    if constexpr (MAX_TOKENS > 1) {
        if (tokens < MAX_TOKENS)
            return dispatch_tokens<MAX_TOKENS - 1>(x, panels, panel_stride, depth, tokens, sums, ahead);
    }
    if constexpr (2 * MAX_TOKENS <= WeightTraits<Weight>::max_accumulators) {
        multiply_some<MAX_TOKENS, 2>(x, panels, panel_stride, depth, sums, ahead);
    } else {
        multiply_some<MAX_TOKENS, 1>(x, panels, 0, depth, sums, ahead);
        multiply_some<MAX_TOKENS, 1>(x, panels + panel_stride, 0, depth, sums + NR, {ahead.panel[1], nullptr});
    }
}

// sums (tokens, 2 * NR) of two panels for up to max_tokens tokens.  Not inlined: one copy of each microkernel will do.
template <class Weight>
__attribute__((noinline)) void multiply_panels(const activation_of<Weight>* x, const Weight* panels,
                                               int64_t panel_stride, int64_t depth, int64_t tokens, float* sums,
                                               Ahead<Weight> ahead) {
    dispatch_tokens<WeightTraits<Weight>::max_tokens>(x, panels, panel_stride, depth, tokens, sums, ahead);
}

// How products are computed.
struct Execution {
    int threads;
    // In tiles, where the processor has them (amx_tiles.h).
    bool tiles;
    // split_size() elements for each token of a pass, where activations are split for tiles (split_tiles.h).
    bfloat16* split = nullptr;

    // Tokens of one call of a microkernel.
    template <class Weight>
    int64_t max_tokens() const {
        return !tiles ? WeightTraits<Weight>::max_tokens : is_split<Weight> ? TOKEN_BLOCK : TILE_TOKENS;
    }
};

// One call of a microkernel: some tokens of a tile of the output.
struct TokenGroup {
    int64_t begin, count;
    // Which one of how many that multiply the same panels one after the other.
    int64_t index, groups;
};

// Tokens of the largest one.
template <class Weight>
constexpr int64_t MAX_GROUP = is_split<Weight> ? TOKEN_BLOCK : std::max<int64_t>(TILE_TOKENS, 12);

// The activations of a linear layer, (tokens, depth).
template <class Weight>
struct Inputs {
    const activation_of<Weight>* x;
    int64_t tokens, depth;

    // Split them where tiles multiply them so.  Must be called by every thread of a parallel region, and may end with a
    // barrier.
    void split(Execution execution) const {
        if constexpr (is_split<Weight>)
            if (execution.tiles) split_activations(x, depth, tokens, execution.split);
    }
};

// Two panels that are multiplied, and those that this thread presumably multiplies next.
template <class Weight>
struct PanelPair {
    const Weight *panels, *next;
    int64_t stride;

    // What a group of tokens prefetches.  Where only one reads these panels, they are what it waits for, else the first
    // two read a panel each of the next pair, so that memory works while the processor computes.  Where the panels of
    // a pair are multiplied one after the other that was slower.
    Ahead<Weight> ahead(TokenGroup group) const {
        Ahead<Weight> own = {{panels + PREFETCH_DISTANCE, panels + stride + PREFETCH_DISTANCE}};
        constexpr bool both_at_a_time = 2 * WeightTraits<Weight>::max_tokens <= WeightTraits<Weight>::max_accumulators;
        if (both_at_a_time && group.groups > 1 && group.index < 2) own.panel[group.index] = next + group.index * stride;
        return own;
    }
};

// sums (tokens, 2 * NR) of a pair of panels for a group of tokens.
template <class Weight>
void multiply(Inputs<Weight> inputs, PanelPair<Weight> pair, TokenGroup group, float* sums, Execution execution) {
    const int64_t depth = inputs.depth;
    const activation_of<Weight>* x = inputs.x + group.begin * depth;
#if defined(LLMK_HAVE_TILES)
    if (execution.tiles) {
        if constexpr (is_split<Weight>)
            multiply_split<Tiles, Weight>(execution.split + group.begin * SPLIT_TERMS * TILE_INPUTS, inputs.tokens,
                                          {pair.panels, pair.next, pair.stride, depth}, group.count, sums);
        else
            multiply_packed_tiles<Tiles>(x, pair.panels, pair.stride, depth, group.count, sums, pair.ahead(group));
        return;
    }
#endif
    (void)execution;
    multiply_panels(x, pair.panels, pair.stride, depth, group.count, sums, pair.ahead(group));
}

// Parallel loop over blocks of tokens and pairs of panels, which calls `body(pair, next pair, group)` for groups of
// nearly equal size of the block's tokens; must be called by every thread of the parallel region and ends with a
// barrier.  Few tokens are bound by memory: each thread gets long stretches of weights.  Many are bound by arithmetic:
// pairs are handed out one by one, so that no thread waits long.
template <class Weight, class Body>
void parallel_for_groups(int64_t pairs, int64_t tokens, Execution execution, Body body) {
    const int64_t max_tokens = execution.max_tokens<Weight>();
    const int64_t stretch = pairs / (CHUNKS_PER_THREAD * execution.threads);
    const int64_t few = std::clamp<int64_t>(max_tokens, 2 * MR, TILE_TOKENS);
    const int64_t chunk = tokens > few ? 1 : std::max<int64_t>(1, stretch);
    const int64_t blocks = (tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t tile = 0; tile < blocks * pairs; tile++) {
        const int64_t block = tile / pairs, pair = tile % pairs;
        const int64_t next = std::min(pair + (chunk == 1 ? execution.threads : 1), pairs - 1);
        int64_t begin = block * tokens / blocks;
        const int64_t end = (block + 1) * tokens / blocks, groups = (end - begin + max_tokens - 1) / max_tokens;
        for (int64_t index = 0; index < groups; index++) {
            const int64_t count = (end - begin + groups - index - 1) / (groups - index);
            body(pair, next, TokenGroup{begin, count, index, groups});
            begin += count;
        }
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

// sums (width,) of some outputs from `first` on become results.
template <class Weight>
inline void scale_and_bias(float* sums, PackedWeights<Weight> weights, int64_t first, int64_t width) {
    int64_t lane = 0;
    for (; lane + LANES <= width; lane += LANES)
        store(sums + lane, weights.apply_scale_and_bias(load(sums + lane), first + lane));
    for (; lane < width; lane++) sums[lane] = weights.apply_scale_and_bias(sums[lane], first + lane);
}

// to (width,) = results, or += results with ACCUMULATE.
template <bool ACCUMULATE, class Output>
inline void store_results(const float* results, int64_t width, Output* to) {
    int64_t lane = 0;
    for (; lane + LANES <= width; lane += LANES) {
        f32x8 result = load(results + lane);
        if constexpr (ACCUMULATE) result += load(to + lane);
        store(to + lane, result);
    }
    for (; lane < width; lane++) {
        if constexpr (std::is_same_v<Output, bfloat16>)
            to[lane] = to_bfloat16(results[lane]);
        else
            to[lane] = (ACCUMULATE ? to[lane] : 0.0f) + results[lane];
    }
}

// A linear layer: out (tokens, outputs) = x (tokens, depth) W^T + bias, or out += that with ACCUMULATE.  `epilogue` may
// change the results of a tile before they are stored or added; `prefetch` is called before they are computed.  Must be
// called by every thread of a parallel region and ends with a barrier.
template <bool ACCUMULATE, class Weight, class Output, class Epilogue = NoEpilogue>
void linear(const activation_of<Weight>* x, PackedWeights<Weight> weights, int64_t depth, int64_t outputs,
            int64_t tokens, Output* out, Execution execution, Epilogue epilogue = {}) {
    static_assert(!ACCUMULATE || std::is_same_v<Output, float>, "residual sums stay in float32");
    constexpr int64_t PAIR = 2 * NR;
    const int64_t pairs = (outputs + PAIR - 1) / PAIR;
    const Inputs<Weight> inputs{x, tokens, depth};
    inputs.split(execution);
    parallel_for_groups<Weight>(pairs, tokens, execution, [&](int64_t pair, int64_t next, TokenGroup group) {
        const int64_t first = pair * PAIR, width = std::min(PAIR, outputs - first);
        alignas(64) float sums[MAX_GROUP<Weight> * PAIR];
        const LinearTile tile{group.begin, group.count, first, width, sums, PAIR};
        epilogue.prefetch(tile);
        multiply<Weight>(inputs, {weights.panels + first * depth, weights.panels + next * PAIR * depth, NR * depth},
                         group, sums, execution);
        for (int64_t row = 0; row < group.count; row++) scale_and_bias(sums + row * PAIR, weights, first, width);
        epilogue.apply(tile);
        for (int64_t row = 0; row < group.count; row++)
            store_results<ACCUMULATE>(sums + row * PAIR, width, out + (group.begin + row) * outputs + first);
    });
}

}  // namespace
