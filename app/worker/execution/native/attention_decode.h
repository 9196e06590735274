// Single-query attention of one token for one KV head, bound by the reading of its keys and values.
//
// In float32 the scores of all keys are stored: one pass computes them, one their softmax, one the weighted values.  In
// bfloat16, where rounding is coarse, everything is computed in the order of attention_prefill.h, so that the bits of a
// token's result are the same whether it is computed by itself or with its neighbours.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention_prefill.h"
#include "bf16.h"
#include "simd.h"

namespace {

constexpr int HEAD_VECTORS = HEAD_SIZE / LANES;
static_assert(HEAD_SIZE % LANES == 0, "a head fills whole vectors");
// Vectors of a value whose accumulators for all queries fit AVX2's 16 registers.
constexpr int VALUE_VECTORS = QUERIES_PER_KV * 4 <= 12 && HEAD_VECTORS % 4 == 0   ? 4
                              : QUERIES_PER_KV * 2 <= 12 && HEAD_VECTORS % 2 == 0 ? 2
                                                                                  : 1;

// Scores of the queries of one KV head, (QUERIES_PER_KV, stride), with all keys.
template <class Query>
void compute_scores(const Query* q, const float* keys, float* scores, int64_t count, int64_t stride, float scale) {
    for (int64_t key = 0; key < count; key++) {
        f32x8 sums[QUERIES_PER_KV] = {};
        for (int vector = 0; vector < HEAD_VECTORS; vector++) {
            const f32x8 k = load(keys + key * HEAD_SIZE + vector * LANES);
            for (int query = 0; query < QUERIES_PER_KV; query++)
                sums[query] += k * load(q + query * HEAD_SIZE + vector * LANES);
        }
        for (int query = 0; query < QUERIES_PER_KV; query++)
            scores[query * stride + key] = scale * reduce_sum(sums[query]);
    }
}

// Softmax of `count` scores in place; the padding up to `stride`, a multiple of LANES, becomes 0.
inline void softmax(float* scores, int64_t count, int64_t stride) {
    std::fill(scores + count, scores + stride, -std::numeric_limits<float>::infinity());
    f32x8 maxima = load(scores);
    for (int64_t key = LANES; key < stride; key += LANES) maxima = maximum(load(scores + key), maxima);
    float row_max = maxima[0];
    for (int lane = 1; lane < LANES; lane++) row_max = std::max(row_max, maxima[lane]);
    f32x8 row_sum = {};
    for (int64_t key = 0; key < stride; key += LANES) {
        const f32x8 exponential = exp_nonpositive(load(scores + key) - row_max);
        store(scores + key, exponential);
        row_sum += exponential;
    }
    const float reciprocal = 1.0f / reduce_sum(row_sum);
    for (int64_t key = 0; key < stride; key += LANES) store(scores + key, load(scores + key) * reciprocal);
}

// out (QUERIES_PER_KV, HEAD_SIZE) = the values weighted by probabilities (QUERIES_PER_KV, stride).
inline void accumulate_values(const float* probabilities, const float* values, float* out, int64_t count,
                              int64_t stride) {
    for (int begin = 0; begin < HEAD_VECTORS; begin += VALUE_VECTORS) {
        f32x8 sums[QUERIES_PER_KV][VALUE_VECTORS] = {};
        for (int64_t key = 0; key < count; key++) {
            f32x8 v[VALUE_VECTORS];
            for (int vector = 0; vector < VALUE_VECTORS; vector++)
                v[vector] = load(values + key * HEAD_SIZE + (begin + vector) * LANES);
            for (int query = 0; query < QUERIES_PER_KV; query++)
                for (int vector = 0; vector < VALUE_VECTORS; vector++)
                    sums[query][vector] += v[vector] * probabilities[query * stride + key];
        }
        for (int query = 0; query < QUERIES_PER_KV; query++)
            for (int vector = 0; vector < VALUE_VECTORS; vector++)
                store(out + query * HEAD_SIZE + (begin + vector) * LANES, sums[query][vector]);
    }
}

// Transpose up to NR keys: out[pair] has the pair of each key in its lane and 0 in the lanes of missing keys.
inline void transpose_keys(const bfloat16* keys, int64_t count, int64_t pairs, bf16_pairs (&out)[NR]) {
#if defined(LLMK_HAVE_AVX512_BF16)
    __m512 rows[NR], halves[NR];
    const __mmask16 mask = pairs < NR ? (1u << pairs) - 1 : 0xffff;
    for (int key = 0; key < NR; key++)
        rows[key] = (__m512)_mm512_maskz_loadu_epi32(key < count ? mask : 0, keys + key * HEAD_SIZE);
    for (int at = 0; at < NR; at += 2) {
        halves[at] = _mm512_unpacklo_ps(rows[at], rows[at + 1]);
        halves[at + 1] = _mm512_unpackhi_ps(rows[at], rows[at + 1]);
    }
    for (int at = 0; at < NR; at += 4)
        for (int half = 0; half < 2; half++) {
            const __m512d left = (__m512d)halves[at + half], right = (__m512d)halves[at + 2 + half];
            rows[at + 2 * half] = (__m512)_mm512_unpacklo_pd(left, right);
            rows[at + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(left, right);
        }
    // By now a 128-bit lane holds four keys of one pair; two shuffles of whole lanes finish the transposition.
    for (int pair = 0; pair < 4; pair++) {
        const __m512 low = _mm512_shuffle_f32x4(rows[pair], rows[4 + pair], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(rows[8 + pair], rows[12 + pair], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(rows[pair], rows[4 + pair], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(rows[8 + pair], rows[12 + pair], 0xdd);
        out[pair] = (bf16_pairs)_mm512_shuffle_f32x4(low, high, 0x88);
        out[8 + pair] = (bf16_pairs)_mm512_shuffle_f32x4(low, high, 0xdd);
        out[4 + pair] = (bf16_pairs)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        out[12 + pair] = (bf16_pairs)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
#else
    for (int64_t at = 0; at < pairs; at++)
        for (int64_t key = 0; key < NR; key++)
            out[at][key] = key < count ? load_pair(keys + key * HEAD_SIZE + 2 * at) : 0;
#endif
}

template <class Number>
class DecodeAttention;

template <>
class DecodeAttention<float> {
  public:
    // q, out: (QUERIES_PER_KV, HEAD_SIZE); keys, values: the slot's, from its start; begin_key, end_key: of the token's
    // key range.
    template <class Query>
    void attend(const Query* q, const float* keys, const float* values, float* out, int64_t begin_key, int64_t end_key,
                float scale) {
        const int64_t count = end_key - begin_key, stride = (count + LANES - 1) / LANES * LANES;
        scores_.resize(QUERIES_PER_KV * stride);
        compute_scores(q, keys + begin_key * HEAD_SIZE, scores_.data(), count, stride, scale);
        for (int query = 0; query < QUERIES_PER_KV; query++) softmax(scores_.data() + query * stride, count, stride);
        accumulate_values(scores_.data(), values + begin_key * HEAD_SIZE, out, count, stride);
    }

  private:
    std::vector<float> scores_;
};

template <>
class DecodeAttention<bfloat16> {
  public:
    template <class Query>
    void attend(const Query* q, const bfloat16* keys, const bfloat16* values, bfloat16* out, int64_t begin_key,
                int64_t end_key, float scale) {
        for (int at = 0; at < QUERIES_PER_KV * HEAD_SIZE; at += LANES) store(queries_ + at, scale * load(q + at));
        std::fill(sums_, sums_ + QUERIES_PER_KV * HEAD_SIZE, 0.0f);
        std::fill(row_sum_, row_sum_ + QUERIES_PER_KV, 0.0f);
        std::fill(row_max_, row_max_ + QUERIES_PER_KV, std::numeric_limits<float>::lowest());
        for (int64_t key = begin_key / KEY_BLOCK * KEY_BLOCK; key < end_key; key += KEY_BLOCK) {
            const int64_t count = std::min(KEY_BLOCK, end_key - key);
            compute_scores(keys + key * HEAD_SIZE, count);
            for (int query = 0; query < QUERIES_PER_KV; query++)
                softmax(query, std::max<int64_t>(0, begin_key - key), count);
            accumulate_values(values + key * HEAD_SIZE, count);
        }
        for (int at = 0; at < QUERIES_PER_KV * HEAD_SIZE; at += LANES)
            store(out + at, (1.0f / row_sum_[at / HEAD_SIZE]) * load(sums_ + at));
    }

  private:
    void compute_scores(const bfloat16* keys, int64_t count) {
        for (int64_t key = 0; key < count; key += NR) {
            f32x16 sums[QUERIES_PER_KV] = {};
            for (int64_t begin = 0; begin < HEAD_SIZE / 2; begin += NR) {
                const int64_t pairs = std::min<int64_t>(NR, HEAD_SIZE / 2 - begin);
                bf16_pairs columns[NR];
                transpose_keys(keys + key * HEAD_SIZE + 2 * begin, count - key, pairs, columns);
                for (int64_t pair = 0; pair < pairs; pair++)
                    for (int query = 0; query < QUERIES_PER_KV; query++)
                        accumulate_dot(sums[query], columns[pair],
                                       load_pair(queries_ + query * HEAD_SIZE + 2 * (begin + pair)));
            }
            for (int query = 0; query < QUERIES_PER_KV; query++)
                std::memcpy(scores_ + query * KEY_BLOCK + key, &sums[query], sizeof(f32x16));
        }
    }

    // One block of the online softmax for one query, over keys `first` to `count` of the block; the same operations in
    // the same order as in PrefillAttention.
    void softmax(int query, int64_t first, int64_t count) {
        float *scores = scores_ + query * KEY_BLOCK, old_max = row_max_[query];
        const int64_t padded = (count + LANES - 1) / LANES * LANES;
        std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
        std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
        f32x8 maxima = broadcast(old_max), block_sum = {};
        for (int64_t key = 0; key < padded; key += LANES) maxima = maximum(load(scores + key), maxima);
        float row_max = old_max;
        for (int lane = 0; lane < LANES; lane++) row_max = std::max(row_max, maxima[lane]);
        for (int64_t key = 0; key < padded; key += LANES) {
            const f32x8 probability = exp_nonpositive(load(scores + key) - row_max);
            store(probabilities_ + query * KEY_BLOCK + key, probability);
            block_sum += probability;
        }
        const float factor = exp_nonpositive(broadcast(old_max) - row_max)[0];
        row_sum_[query] = row_sum_[query] * factor + reduce_sum(block_sum);
        row_max_[query] = row_max;
        if (factor != 1.0f)
            for (int at = query * HEAD_SIZE; at < (query + 1) * HEAD_SIZE; at += LANES)
                store(sums_ + at, load(sums_ + at) * factor);
    }

    // Add the weighted values of a block, those of two keys at a time.
    void accumulate_values(const bfloat16* values, int64_t count) {
        constexpr int VECTORS = HEAD_SIZE / NR;
        // As many as keep their accumulators in registers.
        constexpr int GROUP = VECTORS % 4 == 0 && QUERIES_PER_KV <= 6    ? 4
                              : VECTORS % 2 == 0 && QUERIES_PER_KV <= 12 ? 2
                                                                         : 1;
        static const bfloat16 zero_value[HEAD_SIZE] = {};
        for (int begin = 0; begin < VECTORS; begin += GROUP) {
            f32x16 sums[QUERIES_PER_KV][GROUP];
            float* to = sums_ + begin * NR;
            for (int query = 0; query < QUERIES_PER_KV; query++)
                std::memcpy(sums[query], to + query * HEAD_SIZE, sizeof sums[query]);
            for (int64_t key = 0; key < count; key += 2) {
                const bfloat16* left = values + key * HEAD_SIZE;
                const bfloat16* right = key + 1 < count ? left + HEAD_SIZE : zero_value;
                bf16_pairs pairs[GROUP];
                for (int vector = 0; vector < GROUP; vector++)
                    pairs[vector] = interleave(left + (begin + vector) * NR, right + (begin + vector) * NR);
                for (int query = 0; query < QUERIES_PER_KV; query++) {
                    const uint32_t factor = load_pair(probabilities_ + query * KEY_BLOCK + key);
                    for (int vector = 0; vector < GROUP; vector++)
                        accumulate_dot(sums[query][vector], pairs[vector], factor);
                }
            }
            for (int query = 0; query < QUERIES_PER_KV; query++)
                std::memcpy(to + query * HEAD_SIZE, sums[query], sizeof sums[query]);
        }
        if constexpr (HEAD_SIZE % NR != 0) accumulate_last_vector(values, count);
    }

    // The half vector at the end of heads of 24, 40, ... elements.  PrefillAttention never computes such heads, so the
    // order of the sum is free.
    void accumulate_last_vector(const bfloat16* values, int64_t count) {
        for (int query = 0; query < QUERIES_PER_KV; query++) {
            float* to = sums_ + (query + 1) * HEAD_SIZE - LANES;
            f32x8 sum = load(to);
            for (int64_t key = 0; key < count; key++)
                sum += load(values + (key + 1) * HEAD_SIZE - LANES) * to_float(probabilities_[query * KEY_BLOCK + key]);
            store(to, sum);
        }
    }

    bfloat16 queries_[QUERIES_PER_KV * HEAD_SIZE], probabilities_[QUERIES_PER_KV * KEY_BLOCK];
    float scores_[QUERIES_PER_KV * KEY_BLOCK], sums_[QUERIES_PER_KV * HEAD_SIZE];
    float row_sum_[QUERIES_PER_KV], row_max_[QUERIES_PER_KV];
};

}  // namespace
