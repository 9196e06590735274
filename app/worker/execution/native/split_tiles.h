// Products of float32 activations in tiles (amx_tiles.h), which multiply bfloat16 only: each number is a sum of those.
//
// A float32 has 24 significant bits and a bfloat16 eight, so that cutting a float32 off three times gives three terms
// whose sum it is, exactly; a float16 is the sum of two, and an int8 is a bfloat16.  A product is the sum of the terms'
// products, all of which one tile accumulates in float32.  Those below 2^-24 of the whole are left out:
//
//                        x: 1st   2nd   3rd term
//   weight: 1st term        1   2^-8  2^-16        int8_t: this line, which leaves out nothing
//           2nd term     2^-8  2^-16               float16: two lines
//           3rd term    2^-16                      float
//
// Activations are split once for a product, and panels of weights widened once for a block of tokens.  Terms below
// 2^-126 count as nothing in a tile, and an infinite activation becomes a NaN.

#pragma once

#include <algorithm>

#include "amx_tiles.h"
#include "bf16.h"
#include "simd.h"
#include "weight_types.h"

namespace {

// Of an activation.
constexpr int64_t SPLIT_TERMS = 3;
// Of a weight.
template <class Weight>
constexpr int64_t WEIGHT_TERMS = sizeof(Weight) == 1 ? 1 : sizeof(Weight) == 2 ? 2 : 3;
// Inputs of a panel that are widened at a time, so that they and the sums of a block stay in the first-level cache.
template <class Weight>
constexpr int64_t WIDENED_INPUTS = WEIGHT_TERMS<Weight> == 1 ? 256 : 128;

// Take the leading term off floats: the upper half of their bits.
template <class Floats, class Bits>
inline Bits take_term(Floats& numbers) {
    Bits bits;
    std::memcpy(&bits, &numbers, sizeof bits);
    bits &= 0xffff0000u;
    Floats term;
    std::memcpy(&term, &bits, sizeof term);
    numbers -= term;
    return bits;
}

// Steps of TILE_INPUTS that some inputs fill.
constexpr int64_t tile_steps(int64_t inputs) { return (inputs + TILE_INPUTS - 1) / TILE_INPUTS; }

// Elements that a token's split activations take.
constexpr int64_t split_size(int64_t depth) { return tile_steps(depth) * SPLIT_TERMS * TILE_INPUTS; }

// Split x (tokens, depth) to (steps, tokens, SPLIT_TERMS, TILE_INPUTS), filled up with zeros.  Must be called by every
// thread of a parallel region and ends with a barrier.
inline void split_activations(const float* x, int64_t depth, int64_t tokens, bfloat16* split) {
    const int64_t rows = tile_steps(depth) * tokens;
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const int64_t first = row / tokens * TILE_INPUTS, token = row % tokens;
        float inputs[TILE_INPUTS] = {};
        std::copy_n(x + token * depth + first, std::min(TILE_INPUTS, depth - first), inputs);
        for (int64_t at = 0; at < TILE_INPUTS; at += LANES) {
            f32x8 numbers = load(inputs + at);
            for (int64_t term = 0; term < SPLIT_TERMS; term++) {
                typedef uint16_t u16x8 __attribute__((vector_size(LANES * sizeof(uint16_t))));
                const u16x8 halves = __builtin_convertvector(take_term<f32x8, u32x8>(numbers) >> 16, u16x8);
                std::memcpy(split + (row * SPLIT_TERMS + term) * TILE_INPUTS + at, &halves, sizeof halves);
            }
        }
    }
}

// Panels of weights, and those that are prefetched while they are multiplied, `stride` elements apart.
template <class Weight>
struct SplitPanels {
    const Weight *panels, *next;
    int64_t stride, depth;
};

// Widen some inputs of a panel, from `first` on, to pairs of each term, (WEIGHT_TERMS, WIDENED_INPUTS / 2, NR, 2); the
// last step of a tile is filled up with zeros.  As many inputs from `ahead` on are prefetched.
template <class Weight>
inline void widen_panel(const Weight* panel, const Weight* ahead, int64_t inputs, bfloat16* widened) {
    for (int64_t input = 0; input < tile_steps(inputs) * TILE_INPUTS; input += 2, widened += 2 * NR) {
        __builtin_prefetch(ahead + input * NR);
        if constexpr (sizeof(Weight) > 2) __builtin_prefetch(ahead + (input + 1) * NR);
        f32x16 even = {}, odd = {};
        if (input < inputs) even = load_line(panel + input * NR);
        if (input + 1 < inputs) odd = load_line(panel + (input + 1) * NR);
        for (int64_t term = 0; term < WEIGHT_TERMS<Weight>; term++) {
            const bf16_pairs low = take_term<f32x16, bf16_pairs>(even), high = take_term<f32x16, bf16_pairs>(odd);
            const bf16_pairs pairs = low >> 16 | high;
            std::memcpy(widened + term * WIDENED_INPUTS<Weight> * NR, &pairs, sizeof pairs);
        }
    }
}

// sums (tokens, 2 * NR) of two panels for any tokens of a pass of `all` tokens; `split` is the first one's.
template <class AnyTiles, class Weight>
__attribute__((noinline)) void multiply_split(const bfloat16* split, int64_t all, SplitPanels<Weight> weights,
                                              int64_t tokens, float* sums) {
    constexpr int64_t INPUTS = WIDENED_INPUTS<Weight>, TERM = INPUTS * NR, ROW = SPLIT_TERMS * TILE_INPUTS;
    alignas(64) bfloat16 widened[2][WEIGHT_TERMS<Weight> * TERM];
    const int64_t groups = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    for (int64_t first = 0; first < weights.depth; first += INPUTS, split += tile_steps(INPUTS) * all * ROW) {
        const int64_t inputs = std::min(INPUTS, weights.depth - first);
        for (int64_t panel = 0; panel < 2; panel++) {
            const Weight* from = weights.panels + panel * weights.stride + first * NR;
            const bool last = first + INPUTS >= weights.depth;
            widen_panel(from, last ? weights.next + panel * weights.stride : from + TERM, inputs, widened[panel]);
        }
        for (int64_t group = 0, begin = 0; group < groups; group++) {
            const int64_t count = (tokens - begin + groups - group - 1) / (groups - group);
            AnyTiles tiles(count, first > 0 ? sums + begin * 2 * NR : nullptr);
            for (int64_t step = 0; step < tile_steps(inputs); step++)
                for (int64_t term = 0; term < WEIGHT_TERMS<Weight>; term++) {
                    const int64_t at = term * TERM + step * TILE_INPUTS * NR;
                    tiles.load_weights(widened[0] + at, widened[1] + at, 2 * NR);
                    for (int64_t other = 0; term + other < SPLIT_TERMS; other++)
                        tiles.multiply(split + (step * all + begin) * ROW + other * TILE_INPUTS, ROW);
                }
            tiles.store(sums + begin * 2 * NR);
            begin += count;
        }
    }
}

}  // namespace
