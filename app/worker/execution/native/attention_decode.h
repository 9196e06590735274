// Attention of one token by itself for one KV head, over keys that are read once and for nobody else.
//
// In float32 scores are kept whole: one pass for them, one for their softmax, one for the values.  In bfloat16, where
// rounding is coarse, all is done in the order of attention_prefill.h, so that a token's numbers are the same bit for bit whether
// it comes alone or with others; the macros are those of that file.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "bf16.h"
#include "attention_prefill.h"
#include "simd.h"

namespace {

constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

// Scores of the queries of one KV head with all keys; `padded` is the room of one query's scores.
template <class Query>
void score(const Query* q, const float* keys, float* scores, int64_t count, int64_t padded, float scale) {
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
inline void soften(float* scores, int64_t count, int64_t padded) {
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
inline void gather(const float* weights, const float* values, float* out, int64_t count, int64_t padded) {
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

// Sixteen keys' pairs, from the first, as columns: that of each key in its own lane; those of no key are 0.
inline void columns(const Bfloat* keys, int64_t count, int64_t pairs, Pairs (&out)[PANEL]) {
#if defined(PAIRS_IN_HARDWARE)
    __m512 lines[PANEL], halves[PANEL];
    const __mmask16 there = pairs < PANEL ? (1u << pairs) - 1 : 0xffff;
    for (int key = 0; key < PANEL; key++)
        lines[key] = (__m512)_mm512_maskz_loadu_epi32(key < count ? there : 0, keys + key * SIZE);
    for (int at = 0; at < PANEL; at += 2) {
        halves[at] = _mm512_unpacklo_ps(lines[at], lines[at + 1]);
        halves[at + 1] = _mm512_unpackhi_ps(lines[at], lines[at + 1]);
    }
    for (int at = 0; at < PANEL; at += 4)
        for (int half = 0; half < 2; half++) {
            const __m512d left = (__m512d)halves[at + half], right = (__m512d)halves[at + 2 + half];
            lines[at + 2 * half] = (__m512)_mm512_unpacklo_pd(left, right);
            lines[at + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(left, right);
        }
    // Four keys a vector and four pairs apart by now: quarters come to their places in two steps.
    for (int pair = 0; pair < 4; pair++) {
        const __m512 low = _mm512_shuffle_f32x4(lines[pair], lines[4 + pair], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(lines[8 + pair], lines[12 + pair], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(lines[pair], lines[4 + pair], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(lines[8 + pair], lines[12 + pair], 0xdd);
        out[pair] = (Pairs)_mm512_shuffle_f32x4(low, high, 0x88);
        out[8 + pair] = (Pairs)_mm512_shuffle_f32x4(low, high, 0xdd);
        out[4 + pair] = (Pairs)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        out[12 + pair] = (Pairs)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
#else
    for (int64_t at = 0; at < pairs; at++)
        for (int64_t key = 0; key < PANEL; key++) out[at][key] = key < count ? pair(keys + key * SIZE + 2 * at) : 0;
#endif
}

template <class Number>
class Alone;

template <>
class Alone<float> {
  public:
    // q, out: (GROUPS, SIZE); keys, values: of the row, from its start; first, end: what the token looks at.
    template <class Query>
    void attend(const Query* q, const float* keys, const float* values, float* out, int64_t first, int64_t end,
                float scale) {
        const int64_t count = end - first, padded = (count + LANES - 1) / LANES * LANES;
        scores_.resize(GROUPS * padded);
        score(q, keys + first * SIZE, scores_.data(), count, padded, scale);
        for (int group = 0; group < GROUPS; group++) soften(scores_.data() + group * padded, count, padded);
        gather(scores_.data(), values + first * SIZE, out, count, padded);
    }

  private:
    std::vector<float> scores_;
};

template <>
class Alone<Bfloat> {
  public:
    template <class Query>
    void attend(const Query* q, const Bfloat* keys, const Bfloat* values, Bfloat* out, int64_t first, int64_t end,
                float scale) {
        for (int at = 0; at < GROUPS * SIZE; at += LANES) store(queries_ + at, scale * load(q + at));
        std::fill(sums_, sums_ + GROUPS * SIZE, 0.0f);
        std::fill(totals_, totals_ + GROUPS, 0.0f);
        std::fill(mosts_, mosts_ + GROUPS, std::numeric_limits<float>::lowest());
        for (int64_t key = first / KEYS * KEYS; key < end; key += KEYS) {
            const int64_t count = std::min(KEYS, end - key);
            score(keys + key * SIZE, count);
            for (int group = 0; group < GROUPS; group++) soften(group, std::max<int64_t>(0, first - key), count);
            gather(values + key * SIZE, count);
        }
        for (int at = 0; at < GROUPS * SIZE; at += LANES)
            store(out + at, (1.0f / totals_[at / SIZE]) * load(sums_ + at));
    }

  private:
    void score(const Bfloat* keys, int64_t count) {
        for (int64_t key = 0; key < count; key += PANEL) {
            Wide sums[GROUPS] = {};
            for (int64_t part = 0; part < SIZE / 2; part += PANEL) {
                const int64_t pairs = std::min<int64_t>(PANEL, SIZE / 2 - part);
                Pairs its[PANEL];
                columns(keys + key * SIZE + 2 * part, count - key, pairs, its);
                for (int64_t at = 0; at < pairs; at++)
                    for (int group = 0; group < GROUPS; group++)
                        add_products(sums[group], its[at], pair(queries_ + group * SIZE + 2 * (part + at)));
            }
            for (int group = 0; group < GROUPS; group++)
                std::memcpy(scores_ + group * KEYS + key, &sums[group], sizeof(Wide));
        }
    }

    // Weights of a group's scores, of keys from `first` to `count`, as Together makes them.
    void soften(int group, int64_t first, int64_t count) {
        float *scores = scores_ + group * KEYS, before = mosts_[group];
        const int64_t padded = (count + LANES - 1) / LANES * LANES;
        std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
        std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
        Vector most = all(before), total = {};
        for (int64_t key = 0; key < padded; key += LANES) most = greater(load(scores + key), most);
        float peak = before;
        for (int lane = 0; lane < LANES; lane++) peak = std::max(peak, most[lane]);
        for (int64_t key = 0; key < padded; key += LANES) {
            const Vector weight = exponential(load(scores + key) - peak);
            store(weights_ + group * KEYS + key, weight);
            total += weight;
        }
        const float kept = exponential(all(before) - peak)[0];
        totals_[group] = totals_[group] * kept + sum(total);
        mosts_[group] = peak;
        if (kept != 1.0f)
            for (int at = group * SIZE; at < (group + 1) * SIZE; at += LANES) store(sums_ + at, load(sums_ + at) * kept);
    }

    // Add the values of a block, those of two keys at a time.
    void gather(const Bfloat* values, int64_t count) {
        constexpr int PARTS = SIZE / PANEL;
        // As many as have their sums in registers.
        constexpr int SOME = PARTS % 4 == 0 && GROUPS <= 6 ? 4 : PARTS % 2 == 0 && GROUPS <= 12 ? 2 : 1;
        static const Bfloat none[SIZE] = {};
        for (int begin = 0; begin < PARTS; begin += SOME) {
            Wide sums[GROUPS][SOME];
            float* to = sums_ + begin * PANEL;
            for (int group = 0; group < GROUPS; group++) std::memcpy(sums[group], to + group * SIZE, sizeof sums[group]);
            for (int64_t key = 0; key < count; key += 2) {
                const Bfloat *left = values + key * SIZE, *right = key + 1 < count ? left + SIZE : none;
                Pairs its[SOME];
                for (int part = 0; part < SOME; part++)
                    its[part] = paired(left + (begin + part) * PANEL, right + (begin + part) * PANEL);
                for (int group = 0; group < GROUPS; group++) {
                    const uint32_t both = pair(weights_ + group * KEYS + key);
                    for (int part = 0; part < SOME; part++) add_products(sums[group][part], its[part], both);
                }
            }
            for (int group = 0; group < GROUPS; group++) std::memcpy(to + group * SIZE, sums[group], sizeof sums[group]);
        }
        if constexpr (SIZE % PANEL != 0) {
            // Heads that are never attended to together, so in any order.
            for (int group = 0; group < GROUPS; group++) {
                float* to = sums_ + (group + 1) * SIZE - LANES;
                Vector sum = load(to);
                for (int64_t key = 0; key < count; key++)
                    sum += load(values + (key + 1) * SIZE - LANES) * number(weights_[group * KEYS + key]);
                store(to, sum);
            }
        }
    }

    Bfloat queries_[GROUPS * SIZE], weights_[GROUPS * KEYS];
    float scores_[GROUPS * KEYS], sums_[GROUPS * SIZE], totals_[GROUPS], mosts_[GROUPS];
};

}  // namespace
