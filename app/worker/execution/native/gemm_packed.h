// Products of tokens with the weights of a linear layer, which lie in panels.
//
// A panel is the weights of PANEL outputs, (inputs, PANEL), zeros where a layer has fewer: in the order in which they
// are read, so that few tokens take as long as reading them once and many as long as multiplying.  In bfloat16 two inputs
// lie together, (inputs / 2, PANEL, 2), and tokens are in bfloat16 as well.

#pragma once

#include <algorithm>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"
#include "simd.h"

namespace {

// Tokens whose inputs stay in the second-level cache while a panel goes over them.
constexpr int64_t AT_ONCE = 128;
// How far ahead weights are asked for, in numbers: they are read once in a pass, from farther than any cache.
constexpr int64_t AHEAD = 64 * PANEL;
// Parts that each thread's share of panels is cut into for few tokens: a thread that is held up by another process leaves
// the rest to others.
constexpr int64_t PARTS = 6;

// A whole number, as a weight; the numbers of an output share a scale.
typedef int8_t Byte;

inline Vector load(const Byte* from) {
#if defined(__AVX2__)
    // GCC 12 takes the other way one number after the other.
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    Bytes it;
    std::memcpy(&it, from, sizeof it);
    return __builtin_convertvector(__builtin_convertvector(it, Integers), Vector);
#endif
}

#if defined(__F16C__) || defined(__aarch64__)
#define HALVES 1
// A float16 number, as a weight; computed with in float32.
struct Half {
    uint16_t bits;
};

inline Vector load(const Half* from) {
#if defined(__F16C__)
    typedef short Shorts __attribute__((vector_size(LANES * sizeof(short))));
    Shorts it;
    std::memcpy(&it, from, sizeof it);
    return (Vector)__builtin_ia32_vcvtph2ps256(it);
#else
    typedef __fp16 Halves __attribute__((vector_size(LANES * sizeof(__fp16))));
    Halves it;
    std::memcpy(&it, from, sizeof it);
    return __builtin_convertvector(it, Vector);
#endif
}
#endif

// sums (COUNT, PANELS * PANEL) = x (COUNT, depth) times some panels, each `apart` numbers after the other.
//
// Every sum is made in the order of the inputs, so that a token's numbers do not depend on its company.  Few tokens take
// two panels at a time: one has too few sums to keep the processor's arithmetic filled.
template <int COUNT, int PANELS, class Weight>
inline void multiply(const float* x, const Weight* panels, int64_t apart, int64_t depth, float* sums) {
    Vector its[COUNT][PANELS][2] = {};
    for (int64_t place = 0; place < depth; place++)
        for (int panel = 0; panel < PANELS; panel++) {
            const Weight* weights = panels + panel * apart + place * PANEL;
            __builtin_prefetch(weights + AHEAD);
            const Vector left = load(weights), right = load(weights + LANES);
            for (int token = 0; token < COUNT; token++) {
                const float factor = x[token * depth + place];
                its[token][panel][0] += left * factor;
                its[token][panel][1] += right * factor;
            }
        }
    std::memcpy(sums, its, sizeof its);
}

// The same for any number of tokens up to LINES and two panels.  Not inlined: once is enough code to compile.
template <class Weight>
__attribute__((noinline)) void multiply(const float* x, const Weight* panels, int64_t apart, int64_t depth,
                                        int64_t count, float* sums) {
    switch (count) {
        case 1: return multiply<1, 2>(x, panels, apart, depth, sums);
        case 2: return multiply<2, 2>(x, panels, apart, depth, sums);
        case 3: return multiply<3, 2>(x, panels, apart, depth, sums);
    }
    for (int panel = 0; panel < 2; panel++) {
        alignas(64) float half[LINES * PANEL];
        const Weight* from = panels + panel * apart;
        switch (count) {
            case 4: multiply<4, 1>(x, from, apart, depth, half); break;
            case 5: multiply<5, 1>(x, from, apart, depth, half); break;
            default: multiply<LINES, 1>(x, from, apart, depth, half);
        }
        for (int64_t token = 0; token < count; token++)
            std::memcpy(sums + (2 * token + panel) * PANEL, half + token * PANEL, sizeof half / LINES);
    }
}

// Both panels at a time where there are registers for their sums.
template <int COUNT>
inline void multiply(const Bfloat* x, const Bfloat* panels, int64_t apart, int64_t depth, float* sums) {
    constexpr int64_t PAIR = 2 * PANEL;
    if constexpr (2 * COUNT <= SUMS) {
        product<COUNT, 2, false>(x, depth, 2, panels, PAIR, apart, sums, PAIR, PANEL, depth / 2, AHEAD);
    } else {
        product<COUNT, 1, false>(x, depth, 2, panels, PAIR, 0, sums, PAIR, 0, depth / 2, AHEAD);
        product<COUNT, 1, false>(x, depth, 2, panels + apart, PAIR, 0, sums + PANEL, PAIR, 0, depth / 2, AHEAD);
    }
}

// Calls the one for `count` tokens, of up to COUNT.
template <int COUNT>
void choose(const Bfloat* x, const Bfloat* panels, int64_t apart, int64_t depth, int64_t count, float* sums) {
    if constexpr (COUNT > 1) {
        if (count < COUNT) return choose<COUNT - 1>(x, panels, apart, depth, count, sums);
    }
    multiply<COUNT>(x, panels, apart, depth, sums);
}

// What the tokens that are multiplied with weights of a type are, and how many of them at a time.
template <class Weight>
struct Kind {
    typedef float Input;
    static constexpr int64_t lines = LINES;
};

template <>
struct Kind<Bfloat> {
    typedef Bfloat Input;
    static constexpr int64_t lines = SUMS >= 24 ? 12 : LINES;
};

__attribute__((noinline)) inline void multiply(const Bfloat* x, const Bfloat* panels, int64_t apart, int64_t depth,
                                        int64_t count, float* sums) {
    choose<Kind<Bfloat>::lines>(x, panels, apart, depth, count, sums);
}

// Call `use(token, count)` for up to `lines` tokens at a time, about equally many, of all from `token` to `end`.
template <int64_t lines, class Use>
void by_lines(int64_t token, int64_t end, Use use) {
    for (int64_t left = (end - token + lines - 1) / lines; left > 0; left--) {
        const int64_t count = (end - token + left - 1) / left;
        use(token, count);
        token += count;
    }
}

// Share pairs of panels out among the threads of the parallel region that all are in, for some tokens after the other;
// call `use(pair, token, end)`.  All threads have done all of it when it returns.  Few tokens are read for: long stretches
// for each thread.  Many are computed for: small parts, so that no thread waits long for another.
template <class Use>
void share_out(int64_t pairs, int64_t tokens, int threads, Use use) {
    const int64_t part = tokens > 2 * LINES ? 1 : std::max<int64_t>(1, pairs / (PARTS * threads));
    const int64_t blocks = (tokens + AT_ONCE - 1) / AT_ONCE;
#pragma omp for schedule(dynamic, part)
    for (int64_t task = 0; task < blocks * pairs; task++) {
        const int64_t block = task / pairs;
        use(task % pairs, block * tokens / blocks, (block + 1) * tokens / blocks);
    }
}

// Panels for an even number of outputs, what their sums are to be multiplied with, (outputs,) or none, and bias, the same.
template <class Weight>
struct Weights {
    const Weight* panels;
    const float *scales, *bias;

    float finish(float sum, int64_t output) const {
        return (scales ? scales[output] * sum : sum) + (bias ? bias[output] : 0.0f);
    }

    Vector finish(Vector sums, int64_t output) const {
        if (scales) sums *= load(scales + output);
        return bias ? sums + load(bias + output) : sums;
    }
};

// A linear layer, called by all threads of a parallel region: out (tokens, outputs) = x (tokens, depth) times weights,
// or with ADD += that.
template <bool ADD, class Weight, class Output>
void linear(const typename Kind<Weight>::Input* x, Weights<Weight> weights, int64_t depth, int64_t outputs,
            int64_t tokens, Output* out, int threads) {
    static_assert(!ADD || std::is_same_v<Output, float>, "what is added to keeps all its digits");
    constexpr int64_t PAIR = 2 * PANEL, MOST = Kind<Weight>::lines;
    share_out((outputs + PAIR - 1) / PAIR, tokens, threads, [&](int64_t pair, int64_t begin, int64_t end) {
        const int64_t first = pair * PAIR, width = std::min(PAIR, outputs - first);
        by_lines<MOST>(begin, end, [&](int64_t token, int64_t count) {
            alignas(64) float sums[MOST * PAIR];
            multiply(x + token * depth, weights.panels + first * depth, PANEL * depth, depth, count, sums);
            for (int64_t line = 0; line < count; line++) {
                Output* to = out + (token + line) * outputs + first;
                for (int64_t lane = 0; lane < width; lane++) {
                    const float it = weights.finish(sums[line * PAIR + lane], first + lane);
                    if constexpr (std::is_same_v<Output, Bfloat>)
                        to[lane] = rounded(it);
                    else
                        to[lane] = (ADD ? to[lane] : 0.0f) + it;
                }
            }
        });
    });
}

}  // namespace
