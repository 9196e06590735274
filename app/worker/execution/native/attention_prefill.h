// Multi-query attention of neighbouring tokens of one slot for one KV head: two matrix products with a softmax between.
//
// Python sets the macros LLMK_NUM_KV_HEADS, LLMK_QUERIES_PER_KV, LLMK_HEAD_SIZE and LLMK_KV_TYPE, the type of keys and
// values (attention.py), so that every inner loop has a constant trip count.

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "amx_tiles.h"
#include "bf16.h"
#include "simd.h"

namespace {

constexpr int NUM_KV_HEADS = LLMK_NUM_KV_HEADS;
// Query heads that share one KV head.
constexpr int QUERIES_PER_KV = LLMK_QUERIES_PER_KV;
constexpr int HEAD_SIZE = LLMK_HEAD_SIZE;
typedef LLMK_KV_TYPE kv_t;

// Tokens of one call: enough queries to share the reading of keys, few enough to balance the threads.
constexpr int MAX_TOKENS = HEAD_SIZE % NR == 0 && QUERIES_PER_KV <= 24 ? 48 / QUERIES_PER_KV : 1;
constexpr int MAX_QUERIES = (MAX_TOKENS * QUERIES_PER_KV + 47) / 48 * 48;
// Keys of a block, whose scores stay in the first-level cache.
constexpr int64_t KEY_BLOCK = std::is_same_v<kv_t, bfloat16> ? 96 : 120;

// Microkernel: c = a b, or c += a b with ACCUMULATE, of c (MR, NR), a (MR, depth) and b (depth, NR).  Strides are in
// elements; that of the last dimension of b and c is 1.
template <bool ACCUMULATE>
void gemm_microkernel(const float* a, int64_t a_row_stride, int64_t a_depth_stride, const float* b, int64_t b_stride,
                      float* c, int64_t c_stride, int64_t depth) {
    f32x8 accumulators[MR][2] = {};
    for (int row = 0; ACCUMULATE && row < MR; row++)
        for (int half = 0; half < 2; half++) accumulators[row][half] = load(c + row * c_stride + half * LANES);
    for (int64_t k = 0; k < depth; k++) {
        const f32x8 left = load(b + k * b_stride), right = load(b + k * b_stride + LANES);
        for (int row = 0; row < MR; row++) {
            const float factor = a[row * a_row_stride + k * a_depth_stride];
            accumulators[row][0] += left * factor;
            accumulators[row][1] += right * factor;
        }
    }
    for (int row = 0; row < MR; row++)
        for (int half = 0; half < 2; half++) store(c + row * c_stride + half * LANES, accumulators[row][half]);
}

// The two products Q K^T and P V of up to MAX_QUERIES queries.  Scores and probabilities are stored key by key,
// (keys, stride) with the queries of a key side by side, so that keys and values are read without a transposition.
template <class Number>
class QkPv;

template <>
class QkPv<float> {
  public:
    explicit QkPv(bool) {}

    // Pack one element of a query: queries are the columns of panels, (panels, HEAD_SIZE, NR).
    void set_query(int64_t query, int element, float value) {
        panels_[query / NR * NR * HEAD_SIZE + element * NR + query % NR] = value;
    }

    // Scores of a block of keys, (keys, stride).
    void compute_scores(const float* keys, int64_t count, float* scores, int64_t stride) {
        for (int64_t key = 0; key < count; key += MR) {
            const float* from = keys + key * HEAD_SIZE;
            alignas(64) float tail[MR * HEAD_SIZE];
            if (count - key < MR) {
                std::fill(std::copy_n(from, (count - key) * HEAD_SIZE, tail), tail + MR * HEAD_SIZE, 0.0f);
                from = tail;
            }
            for (int64_t panel = 0; panel < stride; panel += NR)
                gemm_microkernel<false>(from, HEAD_SIZE, 1, panels_ + panel * HEAD_SIZE, NR,
                                        scores + key * stride + panel, stride, HEAD_SIZE);
        }
    }

    // out (queries, HEAD_SIZE) += the values of a block, weighted by probabilities (keys, stride).
    void accumulate_values(const float* values, int64_t count, const float* probabilities, int64_t stride, float* out,
                           int64_t queries) {
        for (int element = 0; element < HEAD_SIZE; element += NR)
            for (int64_t query = 0; query < queries; query += MR)
                gemm_microkernel<true>(probabilities + query, 1, stride, values + element, HEAD_SIZE,
                                       out + query * HEAD_SIZE + element, HEAD_SIZE, count);
    }

  private:
    alignas(64) float panels_[MAX_QUERIES * HEAD_SIZE];
};

// The same in pairs, of neighbouring elements of a key and of the values of neighbouring keys; in vectors or in tiles.
template <>
class QkPv<bfloat16> {
  public:
    explicit QkPv(bool tiles) : tiles_(tiles) {}

    // (panels, HEAD_SIZE / 2, NR, 2)
    void set_query(int64_t query, int element, float value) {
        panels_[query / NR * NR * HEAD_SIZE + (element / 2 * NR + query % NR) * 2 + element % 2] = to_bfloat16(value);
    }

    void compute_scores(const bfloat16* keys, int64_t count, float* scores, int64_t stride) {
#if defined(LLMK_HAVE_TILES)
        if (tiles_) return compute_scores_in_tiles(keys, count, scores, stride);
#endif
        for (int64_t panel = 0; panel < stride;) {
            const int64_t left = (stride - panel) / NR;
            if (left >= 3 && MAX_ACCUMULATORS >= 24) {
                compute_panels<3>(keys, count, scores + panel, stride, panel);
                panel += 3 * NR;
            } else if (left >= 2 && MAX_ACCUMULATORS >= 24) {
                compute_panels<2>(keys, count, scores + panel, stride, panel);
                panel += 2 * NR;
            } else {
                compute_panels<1>(keys, count, scores + panel, stride, panel);
                panel += NR;
            }
        }
    }

    void accumulate_values(const bfloat16* values, int64_t count, const float* probabilities, int64_t stride,
                           float* out, int64_t queries) {
        constexpr int VECTORS = HEAD_SIZE / NR;
        constexpr int PANELS = MAX_ACCUMULATORS < 24 ? 1
                               : VECTORS % 4 == 0    ? 4
                               : VECTORS % 3 == 0    ? 3
                               : VECTORS % 2 == 0    ? 2
                                                     : 1;
        constexpr int ROWS = std::min(MAX_ACCUMULATORS / PANELS, 12);
        pack_probabilities_and_values(values, count, probabilities, stride);
#if defined(LLMK_HAVE_TILES)
        if (tiles_) return accumulate_values_in_tiles((count + 1) / 2 * 2, out, queries);
#endif
        for (int element = 0; element < HEAD_SIZE; element += PANELS * NR)
            for (int64_t query = 0; query < queries; query += ROWS)
                gemm_microkernel<ROWS, PANELS, true>(probabilities_ + 2 * query, 2, 2 * MAX_QUERIES,
                                                     values_ + 2 * element, 2 * HEAD_SIZE, 2 * NR,
                                                     out + query * HEAD_SIZE + element, HEAD_SIZE, NR, (count + 1) / 2);
    }

  private:
    template <int PANELS>
    void compute_panels(const bfloat16* keys, int64_t count, float* scores, int64_t stride, int64_t panel) {
        constexpr int ROWS = std::min(MAX_ACCUMULATORS / PANELS, 12);
        for (int64_t key = 0; key < count; key += ROWS) {
            const bfloat16* from = keys + key * HEAD_SIZE;
            bfloat16 tail[ROWS * HEAD_SIZE];
            if (count - key < ROWS) {
                std::fill(std::copy_n(from, (count - key) * HEAD_SIZE, tail), tail + ROWS * HEAD_SIZE, bfloat16{});
                from = tail;
            }
            gemm_microkernel<ROWS, PANELS, false>(from, HEAD_SIZE, 2, panels_ + panel * HEAD_SIZE, 2 * NR,
                                                  NR * HEAD_SIZE, scores + key * stride, stride, NR, HEAD_SIZE / 2);
        }
    }

#if defined(LLMK_HAVE_TILES)
    // Keys are the rows of tiles, and queries the columns.
    void compute_scores_in_tiles(const bfloat16* keys, int64_t count, float* scores, int64_t stride) {
        alignas(64) float sums[TILE_TOKENS * 2 * NR];
        for (int64_t panel = 0; panel < stride; panel += 2 * NR) {
            // A last panel without a neighbour is multiplied twice.
            const int64_t width = std::min<int64_t>(2 * NR, stride - panel), panel_stride = (width - NR) * HEAD_SIZE;
            for (int64_t key = 0; key < count; key += TILE_TOKENS) {
                const int64_t rows = std::min(TILE_TOKENS, count - key);
                multiply_tiles<Tiles>(
                    {keys + key * HEAD_SIZE, HEAD_SIZE, panels_ + panel * HEAD_SIZE, panel_stride, 2 * NR}, HEAD_SIZE,
                    rows, sums);
                for (int64_t row = 0; row < rows; row++)
                    std::copy_n(sums + row * 2 * NR, width, scores + (key + row) * stride + panel);
            }
        }
    }

    // Queries are the rows, and elements of the values the columns.
    void accumulate_values_in_tiles(int64_t keys, float* out, int64_t queries) {
        transpose_probabilities(keys, queries);
        alignas(64) float sums[TILE_TOKENS * 2 * NR];
        for (int element = 0; element < HEAD_SIZE; element += 2 * NR) {
            const int width = std::min(2 * NR, HEAD_SIZE - element);
            for (int64_t query = 0; query < queries; query += TILE_TOKENS) {
                const int64_t rows = std::min(TILE_TOKENS, queries - query);
                multiply_tiles<Tiles>({query_probabilities_ + query * KEY_BLOCK, KEY_BLOCK, values_ + 2 * element,
                                       2 * (width - NR), 2 * HEAD_SIZE},
                                      keys, rows, sums);
                for (int64_t row = 0; row < rows; row++) {
                    float* to = out + (query + row) * HEAD_SIZE + element;
                    for (int lane = 0; lane < width; lane += LANES)
                        store(to + lane, load(to + lane) + load(sums + row * 2 * NR + lane));
                }
            }
        }
    }

    // (keys / 2, MAX_QUERIES, 2) to (queries, KEY_BLOCK)
    void transpose_probabilities(int64_t keys, int64_t queries) {
        for (int64_t query = 0; query < queries; query++)
            for (int64_t key = 0; key < keys; key += 2)
                std::copy_n(probabilities_ + key * MAX_QUERIES + 2 * query, 2,
                            query_probabilities_ + query * KEY_BLOCK + key);
    }

    alignas(64) bfloat16 query_probabilities_[MAX_QUERIES * KEY_BLOCK];
#endif

    // Probabilities (keys / 2, MAX_QUERIES, 2) and values (keys / 2, HEAD_SIZE, 2); an odd last key is paired with 0.
    void pack_probabilities_and_values(const bfloat16* values, int64_t count, const float* probabilities,
                                       int64_t stride) {
        static const float zero_probabilities[MAX_QUERIES] = {};
        static const bfloat16 zero_value[HEAD_SIZE] = {};
        for (int64_t key = 0; key < count; key += 2) {
            const bool paired = key + 1 < count;
            const float *left = probabilities + key * stride, *right = paired ? left + stride : zero_probabilities;
            for (int64_t query = 0; query < stride; query += NR)
                interleave_to(probabilities_ + (key / 2 * MAX_QUERIES + query) * 2, left + query, right + query);
            const bfloat16 *first = values + key * HEAD_SIZE, *second = paired ? first + HEAD_SIZE : zero_value;
            for (int element = 0; element < HEAD_SIZE; element += NR)
                interleave_to(values_ + (key / 2 * HEAD_SIZE + element) * 2, first + element, second + element);
        }
    }

    template <class Number>
    static void interleave_to(bfloat16* to, const Number* left, const Number* right) {
        const bf16_pairs pairs = interleave(left, right);
        std::memcpy(to, &pairs, sizeof pairs);
    }

    [[maybe_unused]] bool tiles_;
    alignas(64) bfloat16 panels_[MAX_QUERIES * HEAD_SIZE];
    alignas(64) bfloat16 probabilities_[KEY_BLOCK * MAX_QUERIES], values_[KEY_BLOCK * HEAD_SIZE];
};

// Attention of up to MAX_TOKENS neighbouring tokens of one slot for one KV head.  Goes over the keys in blocks, whose
// scores never leave the first-level cache, with an online softmax (FlashAttention, Dao and others 2022).
class PrefillAttention {
  public:
    // Whether the keys of this shape can be computed in tiles, if the processor has them.
    static constexpr bool HAS_TILES = std::is_same_v<kv_t, bfloat16> && HEAD_SIZE % NR == 0;

    explicit PrefillAttention(bool tiles) : qk_pv_(tiles) {}

    // q and out: of the first token; begin_key and end_key: (tokens,); keys and values: the slot's, from its start.
    template <class Query>
    void attend(const Query* q, const kv_t* keys, const kv_t* values, kv_t* out, const int64_t* begin_key,
                const int64_t* end_key, int64_t tokens, float scale) {
        // Block borders are multiples of KEY_BLOCK, the same for any tokens of the slot.
        const int64_t begin = begin_key[0] / KEY_BLOCK * KEY_BLOCK, count = end_key[tokens - 1] - begin;
        queries_ = tokens * QUERIES_PER_KV;
        stride_ = (queries_ + NR - 1) / NR * NR;
        pack_queries(q, begin_key, end_key, tokens, begin, count, scale);
        std::fill(sums_, sums_ + MAX_QUERIES * HEAD_SIZE, 0.0f);
        std::fill(row_sum_, row_sum_ + MAX_QUERIES, 0.0f);
        std::fill(row_max_, row_max_ + MAX_QUERIES, std::numeric_limits<float>::lowest());
        for (int64_t key = 0; key < count; key += KEY_BLOCK) {
            const int64_t block = std::min(KEY_BLOCK, count - key);
            qk_pv_.compute_scores(keys + (begin + key) * HEAD_SIZE, block, scores_, stride_);
            for (int64_t panel = 0; panel < stride_; panel += NR) softmax(panel, key, block);
            qk_pv_.accumulate_values(values + (begin + key) * HEAD_SIZE, block, scores_, stride_, sums_, queries_);
        }
        for (int64_t query = 0; query < queries_; query++) {
            kv_t* to = out + query_offset(query);
            const float reciprocal = 1.0f / row_sum_[query];
            for (int element = 0; element < HEAD_SIZE; element += LANES)
                store(to + element, reciprocal * load(sums_ + query * HEAD_SIZE + element));
        }
    }

  private:
    // Of a query from the first one, in q and out: (tokens, NUM_KV_HEADS, QUERIES_PER_KV, HEAD_SIZE).
    static int64_t query_offset(int64_t query) {
        return (query / QUERIES_PER_KV * NUM_KV_HEADS * QUERIES_PER_KV + query % QUERIES_PER_KV) * HEAD_SIZE;
    }

    // Pack the scaled queries, padded with zeros to whole panels, and the key range of each.
    template <class Query>
    void pack_queries(const Query* q, const int64_t* begin_key, const int64_t* end_key, int64_t tokens, int64_t begin,
                      int64_t count, float scale) {
        for (int64_t query = 0; query < stride_; query++) {
            const int64_t token = query / QUERIES_PER_KV;
            const bool padding = token >= tokens;
            begin_key_[query] = padding ? 0 : begin_key[token] - begin;
            end_key_[query] = padding ? count : end_key[token] - begin;
            for (int element = 0; element < HEAD_SIZE; element += LANES) {
                const f32x8 scaled = padding ? f32x8{} : scale * load(q + query_offset(query) + element);
                for (int lane = 0; lane < LANES; lane++) qk_pv_.set_query(query, element + lane, scaled[lane]);
            }
        }
    }

    // One block of the online softmax for a panel of queries and `count` keys from `key` on: replace scores by
    // exp(score - row_max), 0 for masked keys, and rescale row_sum and the sums of values to the new row_max.
    void softmax(int64_t panel, int64_t key, int64_t count) {
        for (int64_t query = panel; query < panel + NR; query += LANES) apply_mask(query, key, count);
        float* scores = scores_ + panel;
        const int64_t stride = stride_;
        // Partial sums of every eighth key, which add up in the order of DecodeAttention.
        f32x8 old_max[2], row_max[2], row_sum[LANES][2] = {};
        std::memcpy(old_max, row_max_ + panel, sizeof old_max);
        std::memcpy(row_max, old_max, sizeof row_max);
        for (int64_t row = 0; row < count; row++)
            for (int half = 0; half < 2; half++)
                row_max[half] = maximum(load(scores + row * stride + half * LANES), row_max[half]);
        for (int64_t row = 0; row < count; row += LANES)
            for (int lane = 0; lane < std::min<int64_t>(LANES, count - row); lane++)
                for (int half = 0; half < 2; half++) {
                    float* at = scores + (row + lane) * stride + half * LANES;
                    const f32x8 probability = exp_nonpositive(load(at) - row_max[half]);
                    store(at, probability);
                    row_sum[lane][half] += probability;
                }
        for (int half = 0; half < 2; half++) {
            const auto pair = [&](int lane) { return row_sum[lane][half] + row_sum[lane + 4][half]; };
            const f32x8 block_sum = (pair(0) + pair(1)) + (pair(2) + pair(3));
            rescale(panel + half * LANES, old_max[half], row_max[half], block_sum);
        }
    }

    void rescale(int64_t query, f32x8 old_max, f32x8 row_max, f32x8 block_sum) {
        const f32x8 factor = exp_nonpositive(old_max - row_max);
        store(row_sum_ + query, load(row_sum_ + query) * factor + block_sum);
        store(row_max_ + query, row_max);
        for (int lane = 0; lane < LANES; lane++)
            if (factor[lane] != 1.0f)
                for (int element = 0; element < HEAD_SIZE; element++)
                    sums_[(query + lane) * HEAD_SIZE + element] *= factor[lane];
    }

    // Set the scores of LANES queries to -inf for keys outside of their range; blocks that all of them see are skipped.
    void apply_mask(int64_t query, int64_t key, int64_t count) {
        const int32_t *const firsts = begin_key_ + query, *const ends = end_key_ + query;
        const int64_t stride = stride_;
        if (*std::max_element(firsts, firsts + LANES) <= key && *std::min_element(ends, ends + LANES) >= key + count)
            return;
        i32x8 first, end;
        std::memcpy(&first, firsts, sizeof first);
        std::memcpy(&end, ends, sizeof end);
        const f32x8 masked = broadcast(-std::numeric_limits<float>::infinity());
        for (int64_t row = 0; row < count; row++) {
            float* at = scores_ + row * stride + query;
            const i32x8 index = static_cast<int32_t>(key + row) - i32x8{};
            store(at, ((index >= first) & (index < end)) ? load(at) : masked);
        }
    }

    int64_t queries_, stride_;
    int32_t begin_key_[MAX_QUERIES], end_key_[MAX_QUERIES];
    QkPv<kv_t> qk_pv_;
    // The last microkernels write whole tiles, up to 12 keys or queries beyond the end.
    alignas(64) float scores_[(KEY_BLOCK + 12) * MAX_QUERIES];
    alignas(64) float sums_[MAX_QUERIES * HEAD_SIZE], row_sum_[MAX_QUERIES], row_max_[MAX_QUERIES];
};

}  // namespace
