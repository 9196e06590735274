// Attention of neighbouring tokens of one row for one KV head: two products of matrices and a softmax between them.
//
// SIZE (of a head), GROUPS (query heads of one KV head), KV_HEADS and NUMBER (the type of keys and values) are macros, so
// that every inner loop has a fixed length.

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "bf16.h"
#include "simd.h"

namespace {

// Tokens that are attended to together: enough queries to share the reading of keys, few enough to share out.
constexpr int TOKENS = SIZE % PANEL == 0 && GROUPS <= 24 ? 48 / GROUPS : 1;
constexpr int MOST = (TOKENS * GROUPS + 47) / 48 * 48;
// Keys of a block, whose scores stay in the first-level cache.
constexpr int64_t KEYS = std::is_same_v<NUMBER, Bfloat> ? 96 : 120;

// c = a b, or with ADD += that, of c (LINES, PANEL), a (LINES, depth) and b (depth, PANEL), whose lines have the given
// distances; `a_step` is that of the numbers of a line of a.
template <bool ADD>
void product(const float* a, int64_t a_line, int64_t a_step, const float* b, int64_t b_line, float* c, int64_t c_line,
             int64_t depth) {
    Vector sums[LINES][2] = {};
    for (int line = 0; ADD && line < LINES; line++)
        for (int half = 0; half < 2; half++) sums[line][half] = load(c + line * c_line + half * LANES);
    for (int64_t place = 0; place < depth; place++) {
        const Vector left = load(b + place * b_line), right = load(b + place * b_line + LANES);
        for (int line = 0; line < LINES; line++) {
            const float factor = a[line * a_line + place * a_step];
            sums[line][0] += left * factor;
            sums[line][1] += right * factor;
        }
    }
    for (int line = 0; line < LINES; line++)
        for (int half = 0; half < 2; half++) store(c + line * c_line + half * LANES, sums[line][half]);
}

// The products of keys and values with up to MOST queries.  Scores lie by key, so that keys and values are both read as
// they are: all queries of a key side by side.
template <class Number>
class Sides;

template <>
class Sides<float> {
  public:
    // One of a query's numbers: queries are the columns of panels, (panels, SIZE, PANEL).
    void set(int64_t query, int part, float it) {
        panels_[query / PANEL * PANEL * SIZE + part * PANEL + query % PANEL] = it;
    }

    // Scores of a block of keys, (keys, line).
    void score(const float* keys, int64_t count, float* scores, int64_t line) {
        for (int64_t key = 0; key < count; key += LINES) {
            const float* from = keys + key * SIZE;
            alignas(64) float last[LINES * SIZE];
            if (count - key < LINES) {
                std::fill(std::copy_n(from, (count - key) * SIZE, last), last + LINES * SIZE, 0.0f);
                from = last;
            }
            for (int64_t panel = 0; panel < line; panel += PANEL)
                product<false>(from, SIZE, 1, panels_ + panel * SIZE, PANEL, scores + key * line + panel, line, SIZE);
        }
    }

    // Add the values of a block to the sums (queries, SIZE), as much of each as its weight (keys, line).
    void gather(const float* values, int64_t count, const float* weights, int64_t line, float* sums, int64_t queries) {
        for (int part = 0; part < SIZE; part += PANEL)
            for (int64_t query = 0; query < queries; query += LINES)
                product<true>(weights + query, 1, line, values + part, SIZE, sums + query * SIZE + part, SIZE, count);
    }

  private:
    alignas(64) float panels_[MOST * SIZE];
};

// The same in pairs: of a key's numbers, and of the values of two keys.
template <>
class Sides<Bfloat> {
  public:
    // (panels, SIZE / 2, PANEL, 2)
    void set(int64_t query, int part, float it) {
        panels_[query / PANEL * PANEL * SIZE + (part / 2 * PANEL + query % PANEL) * 2 + part % 2] = rounded(it);
    }

    void score(const Bfloat* keys, int64_t count, float* scores, int64_t line) {
        for (int64_t panel = 0; panel < line;) {
            const int64_t left = (line - panel) / PANEL;
            if (left >= 3 && SUMS >= 24) {
                score<3>(keys, count, scores + panel, line, panel);
                panel += 3 * PANEL;
            } else if (left >= 2 && SUMS >= 24) {
                score<2>(keys, count, scores + panel, line, panel);
                panel += 2 * PANEL;
            } else {
                score<1>(keys, count, scores + panel, line, panel);
                panel += PANEL;
            }
        }
    }

    void gather(const Bfloat* values, int64_t count, const float* weights, int64_t line, float* sums, int64_t queries) {
        constexpr int PARTS = SIZE / PANEL, AT_ONCE = SUMS < 24          ? 1
                                                      : PARTS % 4 == 0 ? 4
                                                      : PARTS % 3 == 0 ? 3
                                                      : PARTS % 2 == 0 ? 2
                                                                       : 1;
        constexpr int COUNT = std::min(SUMS / AT_ONCE, 12);
        lay_out(values, count, weights, line);
        for (int part = 0; part < SIZE; part += AT_ONCE * PANEL)
            for (int64_t query = 0; query < queries; query += COUNT)
                product<COUNT, AT_ONCE, true>(weights_ + 2 * query, 2, 2 * MOST, values_ + 2 * part, 2 * SIZE, 2 * PANEL,
                                              sums + query * SIZE + part, SIZE, PANEL, (count + 1) / 2);
    }

  private:
    template <int PANELS>
    void score(const Bfloat* keys, int64_t count, float* scores, int64_t line, int64_t panel) {
        constexpr int COUNT = std::min(SUMS / PANELS, 12);
        for (int64_t key = 0; key < count; key += COUNT) {
            const Bfloat* from = keys + key * SIZE;
            Bfloat last[COUNT * SIZE];
            if (count - key < COUNT) {
                std::fill(std::copy_n(from, (count - key) * SIZE, last), last + COUNT * SIZE, Bfloat{});
                from = last;
            }
            product<COUNT, PANELS, false>(from, SIZE, 2, panels_ + panel * SIZE, 2 * PANEL, PANEL * SIZE,
                                          scores + key * line, line, PANEL, SIZE / 2);
        }
    }

    // Weights (keys / 2, MOST, 2) and values (keys / 2, SIZE, 2); the last may have none beside it.
    void lay_out(const Bfloat* values, int64_t count, const float* weights, int64_t line) {
        static const float nothing[MOST] = {};
        static const Bfloat none[SIZE] = {};
        for (int64_t key = 0; key < count; key += 2) {
            const float *left = weights + key * line, *right = key + 1 < count ? left + line : nothing;
            for (int64_t query = 0; query < line; query += PANEL)
                save(paired(left + query, right + query), weights_ + (key / 2 * MOST + query) * 2);
            const Bfloat *first = values + key * SIZE, *second = key + 1 < count ? first + SIZE : none;
            for (int part = 0; part < SIZE; part += PANEL)
                save(paired(first + part, second + part), values_ + (key / 2 * SIZE + part) * 2);
        }
    }

    static void save(const Pairs& it, Bfloat* to) { std::memcpy(to, &it, sizeof it); }

    alignas(64) Bfloat panels_[MOST * SIZE];
    alignas(64) Bfloat weights_[KEYS * MOST], values_[KEYS * SIZE];
};

// Attention of up to TOKENS neighbouring tokens of one row, for one KV head.  Goes over the keys in blocks, whose scores
// never leave the first-level cache, and keeps what of the softmax is known so far (Dao and others 2022).
class Together {
  public:
    // q and out: of the first token; first and end: what each looks at; keys and values: of the row, from its start.
    template <class Query>
    void attend(const Query* q, const NUMBER* keys, const NUMBER* values, NUMBER* out, const int64_t* first,
                const int64_t* end, int64_t tokens, float scale) {
        // Blocks begin where they do for any other tokens of the row.
        const int64_t begin = first[0] / KEYS * KEYS, count = end[tokens - 1] - begin;
        queries_ = tokens * GROUPS;
        line_ = (queries_ + PANEL - 1) / PANEL * PANEL;
        lay_out(q, first, end, tokens, begin, count, scale);
        std::fill(sums_, sums_ + MOST * SIZE, 0.0f);
        std::fill(totals_, totals_ + MOST, 0.0f);
        std::fill(mosts_, mosts_ + MOST, std::numeric_limits<float>::lowest());
        for (int64_t key = 0; key < count; key += KEYS) {
            const int64_t here = std::min(KEYS, count - key);
            sides_.score(keys + (begin + key) * SIZE, here, scores_, line_);
            for (int64_t panel = 0; panel < line_; panel += PANEL) soften(panel, key, here);
            sides_.gather(values + (begin + key) * SIZE, here, scores_, line_, sums_, queries_);
        }
        for (int64_t query = 0; query < queries_; query++) {
            NUMBER* to = out + query / GROUPS * KV_HEADS * GROUPS * SIZE + query % GROUPS * SIZE;
            const float share = 1.0f / totals_[query];
            for (int part = 0; part < SIZE; part += LANES) store(to + part, share * load(sums_ + query * SIZE + part));
        }
    }

  private:
    // The queries, and what each of them looks at.
    template <class Query>
    void lay_out(const Query* q, const int64_t* first, const int64_t* end, int64_t tokens, int64_t begin, int64_t count,
                 float scale) {
        for (int64_t query = 0; query < line_; query++) {
            const int64_t token = query / GROUPS;
            const bool there = token < tokens;
            first_[query] = there ? first[token] - begin : 0;
            end_[query] = there ? end[token] - begin : count;
            const Query* from = q + token * KV_HEADS * GROUPS * SIZE + query % GROUPS * SIZE;
            for (int part = 0; part < SIZE; part += LANES) {
                const Vector its = there ? scale * load(from + part) : Vector{};
                for (int lane = 0; lane < LANES; lane++) sides_.set(query, part + lane, its[lane]);
            }
        }
    }

    // Make the scores of a panel of queries, for `count` keys from `key` on, to exponentials of what each is less than its
    // most so far, 0 for keys not looked at; add these to the totals.
    void soften(int64_t panel, int64_t key, int64_t count) {
        for (int64_t query = panel; query < panel + PANEL; query += LANES) hide(query, key, count);
        float* scores = scores_ + panel;
        const int64_t line = line_;
        // Sums of every eighth key, as those of Alone.
        Vector before[2], most[2], totals[LANES][2] = {};
        std::memcpy(before, mosts_ + panel, sizeof before);
        std::memcpy(most, before, sizeof most);
        for (int64_t place = 0; place < count; place++)
            for (int half = 0; half < 2; half++) most[half] = greater(load(scores + place * line + half * LANES), most[half]);
        for (int64_t place = 0; place < count; place += LANES)
            for (int lane = 0; lane < std::min<int64_t>(LANES, count - place); lane++)
                for (int half = 0; half < 2; half++) {
                    float* at = scores + (place + lane) * line + half * LANES;
                    const Vector weight = exponential(load(at) - most[half]);
                    store(at, weight);
                    totals[lane][half] += weight;
                }
        for (int half = 0; half < 2; half++) {
            const int64_t query = panel + half * LANES;
            const Vector kept = exponential(before[half] - most[half]);
            const auto of = [&](int lane) { return totals[lane][half] + totals[lane + 4][half]; };
            const Vector total = (of(0) + of(1)) + (of(2) + of(3));
            store(totals_ + query, load(totals_ + query) * kept + total);
            store(mosts_ + query, most[half]);
            for (int lane = 0; lane < LANES; lane++)
                if (kept[lane] != 1.0f)
                    for (int part = 0; part < SIZE; part++) sums_[(query + lane) * SIZE + part] *= kept[lane];
        }
    }

    // Take out of the scores of LANES queries those of keys that they do not look at.
    void hide(int64_t query, int64_t key, int64_t count) {
        const int32_t *const firsts = first_ + query, *const ends = end_ + query;
        const int64_t line = line_;
        if (*std::max_element(firsts, firsts + LANES) <= key && *std::min_element(ends, ends + LANES) >= key + count)
            return;
        Integers first, end;
        std::memcpy(&first, firsts, sizeof first);
        std::memcpy(&end, ends, sizeof end);
        for (int64_t place = 0; place < count; place++) {
            float* at = scores_ + place * line + query;
            const Integers number = static_cast<int32_t>(key + place) - Integers{};
            store(at, ((number >= first) & (number < end)) ? load(at) : all(-std::numeric_limits<float>::infinity()));
        }
    }

    int64_t queries_, line_;
    int32_t first_[MOST], end_[MOST];
    Sides<NUMBER> sides_;
    // The last products read and write beyond what is there.
    alignas(64) float scores_[(KEYS + 12) * MOST];
    alignas(64) float sums_[MOST * SIZE], totals_[MOST], mosts_[MOST];
};

}  // namespace
