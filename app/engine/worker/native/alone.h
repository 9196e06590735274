// Attention of one token by itself for one KV head, over keys that are read once and for nobody else.
//
// Scores are kept whole: one pass for them, one for their softmax, one for the values.  The macros are those of together.h.

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "pairs.h"
#include "vectors.h"

namespace {

constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

// Scores of the queries of one KV head with all keys; `padded` is the room of one query's scores.
template <class Number, class Query>
void score(const Query* q, const Number* keys, float* scores, int64_t count, int64_t padded, float scale) {
    for (int64_t key = 0; key < count; key++) {
        Vector sums[GROUPS] = {};
        for (int part = 0; part < VECTORS; part++) {
            const Vector k = load(keys + key * SIZE + part * LANES);
            for (int group = 0; group < GROUPS; group++) sums[group] += k * load(q + group * SIZE + part * LANES);
        }
        for (int group = 0; group < GROUPS; group++) scores[group * padded + key] = scale * sum(sums[group]);
    }
}

// Softmax of some scores in place; what is there of `padded` beyond them becomes 0.
void soften(float* scores, int64_t count, int64_t padded) {
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    Vector mosts = load(scores);
    for (int64_t key = LANES; key < padded; key += LANES) {
        const Vector score = load(scores + key);
        mosts = score > mosts ? score : mosts;
    }
    float most = mosts[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, mosts[lane]);
    Vector total = {};
    for (int64_t key = 0; key < padded; key += LANES) {
        const Vector weight = exponential(load(scores + key) - most);
        store(scores + key, weight);
        total += weight;
    }
    const float share = 1.0f / sum(total);
    for (int64_t key = 0; key < padded; key += LANES) store(scores + key, load(scores + key) * share);
}

// The sum of all values, as much of each as its weight.
template <class Number>
void gather(const float* weights, const Number* values, Number* out, int64_t count, int64_t padded) {
    for (int begin = 0; begin < VECTORS; begin += BLOCK) {
        Vector sums[GROUPS][BLOCK] = {};
        for (int64_t key = 0; key < count; key++) {
            Vector v[BLOCK];
            for (int part = 0; part < BLOCK; part++) v[part] = load(values + key * SIZE + (begin + part) * LANES);
            for (int group = 0; group < GROUPS; group++)
                for (int part = 0; part < BLOCK; part++) sums[group][part] += v[part] * weights[group * padded + key];
        }
        for (int group = 0; group < GROUPS; group++)
            for (int part = 0; part < BLOCK; part++)
                store(out + group * SIZE + (begin + part) * LANES, sums[group][part]);
    }
}

#if defined(PAIRS_IN_HARDWARE)
// Numbers of a vector of pairs.
constexpr int WIDTH = 2 * PANEL;

// The sum of each of 16 vectors' numbers, in their order: halves are added up while the vectors are brought together.
inline __m512 sums_of(__m512 (&its)[PANEL]) {
    for (int at = 0; at < 8; at++)
        its[at] = _mm512_add_ps(_mm512_unpacklo_ps(its[2 * at], its[2 * at + 1]),
                                _mm512_unpackhi_ps(its[2 * at], its[2 * at + 1]));
    for (int at = 0; at < 4; at++) {
        const __m512d left = (__m512d)its[2 * at], right = (__m512d)its[2 * at + 1];
        its[at] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(left, right), (__m512)_mm512_unpackhi_pd(left, right));
    }
    for (int left = 4; left > 1; left /= 2)
        for (int at = 0; at < left / 2; at++)
            its[at] = _mm512_add_ps(_mm512_shuffle_f32x4(its[2 * at], its[2 * at + 1], 0x88),
                                    _mm512_shuffle_f32x4(its[2 * at], its[2 * at + 1], 0xdd));
    return its[0];
}

// Sixteen keys at a time, of heads that fill vectors; those that are missing of the last sixteen are the last key again.
inline void score_pairs(const Bfloat* q, const Bfloat* keys, float* scores, int64_t count, int64_t padded, float scale) {
    for (int64_t key = 0; key < count; key += PANEL)
        for (int group = 0; group < GROUPS; group++) {
            __m512 sums[PANEL];
            for (int at = 0; at < PANEL; at++) {
                const Bfloat* from = keys + std::min(key + at, count - 1) * SIZE;
                sums[at] = _mm512_setzero_ps();
                for (int part = 0; part < SIZE; part += WIDTH)
                    sums[at] = _mm512_dpbf16_ps(sums[at], (__m512bh)_mm512_loadu_si512(from + part),
                                                (__m512bh)_mm512_loadu_si512(q + group * SIZE + part));
            }
            _mm512_storeu_ps(scores + group * padded + key, _mm512_mul_ps(sums_of(sums), _mm512_set1_ps(scale)));
        }
}

// The values of two keys at a time.
inline void gather_pairs(const Bfloat* weights, const Bfloat* values, Bfloat* out, int64_t count, int64_t padded) {
    constexpr int PARTS = SIZE / PANEL, SOME = PARTS % 4 == 0 && GROUPS <= 6 ? 4 : PARTS % 2 == 0 && GROUPS <= 12 ? 2 : 1;
    for (int begin = 0; begin < PARTS; begin += SOME) {
        Wide sums[GROUPS][SOME] = {};
        for (int64_t key = 0; key < count; key += 2) {
            const Bfloat *from = values + key * SIZE + begin * PANEL, *next = key + 1 < count ? from + SIZE : from;
            Pairs pairs[SOME];
            for (int part = 0; part < SOME; part++) pairs[part] = paired(from + part * PANEL, next + part * PANEL);
            for (int group = 0; group < GROUPS; group++) {
                const uint32_t both = pair(weights + group * padded + key);
                for (int part = 0; part < SOME; part++)
                    add_products(sums[group][part], pairs[part], both);
            }
        }
        for (int group = 0; group < GROUPS; group++)
            for (int part = 0; part < SOME; part++) {
                const __m256bh it = _mm512_cvtneps_pbh((__m512)sums[group][part]);
                std::memcpy(out + group * SIZE + (begin + part) * PANEL, &it, sizeof it);
            }
    }
}
#endif

template <class Number>
class Alone {
  public:
    // q, out: (GROUPS, SIZE); keys, values: (count, SIZE) without gaps.
    template <class Query>
    void attend(const Query* q, const Number* keys, const Number* values, Number* out, int64_t count, float scale) {
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        scores_.resize(GROUPS * padded);
        float* scores = scores_.data();
#if defined(PAIRS_IN_HARDWARE)
        if constexpr (std::is_same_v<Number, Bfloat> && SIZE % WIDTH == 0) {
            alignas(64) Bfloat queries[GROUPS * SIZE];
            for (int at = 0; at < GROUPS * SIZE; at += LANES) store(queries + at, load(q + at));
            score_pairs(queries, keys, scores, count, padded, scale);
            weights_.resize(GROUPS * padded);
            for (int group = 0; group < GROUPS; group++) soften(scores + group * padded, count, padded);
            for (int64_t at = 0; at < GROUPS * padded; at += LANES) store(weights_.data() + at, load(scores + at));
            gather_pairs(weights_.data(), values, out, count, padded);
            return;
        }
#endif
        score(q, keys, scores, count, padded, scale);
        for (int group = 0; group < GROUPS; group++) soften(scores + group * padded, count, padded);
        gather(scores, values, out, count, padded);
    }

  private:
    std::vector<float> scores_;
    std::vector<Bfloat> weights_;
};

}  // namespace
