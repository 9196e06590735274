// Attention of tokens, each over its own row of KV cache.
//
// SIZE (of a head), GROUPS (query heads of one KV head) and KV_HEADS are given as macros, so that every inner loop has a
// fixed length.  Scores are kept whole: one pass for them, one for their softmax, one for the values.  A token by itself
// is bound by the reading of its keys; neighbouring tokens of one row share that, and are two products of matrices.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

// Tokens that are attended to together: enough queries to share the reading of keys, few enough to share out.
constexpr int TOKENS = SIZE % PANEL == 0 && GROUPS <= 24 ? 48 / GROUPS : 1;
constexpr int MOST = (TOKENS * GROUPS + 47) / 48 * 48;
// Keys whose values stay in the first-level cache while all queries take them.
constexpr int64_t KEYS = 64;

// Scores of the queries of one KV head with all keys; `padded` is the room of one query's scores.
void score(const float* q, const float* keys, float* scores, int64_t count, int64_t padded, float scale) {
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

void gather(const float* weights, const float* values, float* out, int64_t count, int64_t padded) {
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

// Attention of up to TOKENS neighbouring tokens of one row, for one KV head.  Scores lie by key, so that keys and values
// are both read as they are: all queries of a key side by side.
class Together {
  public:
    // q and out: of the first token; first and end: what each looks at; keys and values: of the row, from its start.
    void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* first,
                const int64_t* end, int64_t tokens, float scale) {
        const int64_t begin = first[0], count = end[tokens - 1] - begin;
        queries_ = tokens * GROUPS;
        line_ = (queries_ + PANEL - 1) / PANEL * PANEL;
        // The last products read and write beyond what is there.
        scores_.resize((count + LINES) * line_ + PANEL);
        lay_out(q, first, end, tokens, begin, count, scale);
        score(keys + begin * SIZE, count);
        for (int64_t panel = 0; panel < line_; panel += PANEL)
            for (int64_t half = panel; half < panel + PANEL; half += LANES) soften(half, count);
        gather(values + begin * SIZE, count);
        for (int64_t query = 0; query < queries_; query++) {
            float* to = out + query / GROUPS * KV_HEADS * GROUPS * SIZE + query % GROUPS * SIZE;
            const float share = 1.0f / totals_[query];
            for (int part = 0; part < SIZE; part++) to[part] = share * sums_[query * SIZE + part];
        }
    }

  private:
    // Queries as the columns of panels, (panels, SIZE, PANEL), and what each of them looks at.
    void lay_out(const float* q, const int64_t* first, const int64_t* end, int64_t tokens, int64_t begin, int64_t count,
                 float scale) {
        for (int64_t query = 0; query < line_; query++) {
            const int64_t token = query / GROUPS;
            const bool there = token < tokens;
            first_[query] = there ? first[token] - begin : 0;
            end_[query] = there ? end[token] - begin : count;
            const float* from = q + token * KV_HEADS * GROUPS * SIZE + query % GROUPS * SIZE;
            float* to = panels_ + query / PANEL * PANEL * SIZE + query % PANEL;
            for (int part = 0; part < SIZE; part++) to[part * PANEL] = there ? scale * from[part] : 0.0f;
        }
    }

    void score(const float* keys, int64_t count) {
        for (int64_t key = 0; key < count; key += LINES) {
            const float* from = keys + key * SIZE;
            alignas(64) float last[LINES * SIZE];
            if (count - key < LINES) {
                std::fill(std::copy_n(from, (count - key) * SIZE, last), last + LINES * SIZE, 0.0f);
                from = last;
            }
            for (int64_t panel = 0; panel < line_; panel += PANEL)
                product<false>(from, SIZE, 1, panels_ + panel * SIZE, PANEL, scores_.data() + key * line_ + panel,
                               line_, SIZE);
        }
    }

    // The exponentials of the scores of LANES queries from `query` on, each less its most, 0 for keys not looked at; and
    // their totals.
    void soften(int64_t query, int64_t count) {
        float* scores = scores_.data() + query;
        Integers first, end;
        std::memcpy(&first, first_ + query, sizeof first);
        std::memcpy(&end, end_ + query, sizeof end);
        const int64_t from = *std::max_element(first_ + query, first_ + query + LANES);
        const int64_t to = *std::min_element(end_ + query, end_ + query + LANES);
        const Vector none = all(-std::numeric_limits<float>::infinity());
        Vector most = none;
        for (int64_t key = 0; key < count; key++) {
            Vector it = load(scores + key * line_);
            if (key < from || key >= to) {
                const Integers place = static_cast<int32_t>(key) - Integers{};
                it = (place >= first) & (place < end) ? it : none;
                store(scores + key * line_, it);
            }
            most = it > most ? it : most;
        }
        Vector total = {};
        for (int64_t key = 0; key < count; key++) {
            const Vector weight = exponential(load(scores + key * line_) - most);
            store(scores + key * line_, weight);
            total += weight;
        }
        store(totals_ + query, total);
    }

    void gather(const float* values, int64_t count) {
        std::fill(sums_, sums_ + MOST * SIZE, 0.0f);
        for (int64_t key = 0; key < count; key += KEYS)
            for (int part = 0; part < SIZE; part += PANEL)
                for (int64_t query = 0; query < queries_; query += LINES)
                    product<true>(scores_.data() + key * line_ + query, 1, line_, values + key * SIZE + part, SIZE,
                                  sums_ + query * SIZE + part, SIZE, std::min(KEYS, count - key));
    }

    int64_t queries_, line_;
    int32_t first_[MOST], end_[MOST];
    alignas(64) float panels_[MOST * SIZE], sums_[MOST * SIZE], totals_[MOST];
    std::vector<float> scores_;
};

// What each token of a pass looks at, (tokens,) each: its row, its first key and the one after its last.  Neither key
// goes back from one token of a row to its next.
struct Seen {
    const int64_t *rows, *first, *end;
};

// Where runs of neighbouring tokens of one row begin, cut so that none is too long, and the end of the last.
std::vector<int64_t> runs(const int64_t* rows, int64_t tokens) {
    std::vector<int64_t> begins;
    for (int64_t token = 0; token < tokens; token++) {
        const bool apart = token == 0 || rows[token] != rows[begins.back()];
        if (apart || token - begins.back() == TOKENS) begins.push_back(token);
    }
    begins.push_back(tokens);
    return begins;
}

// What one thread attends with.
class Attention {
  public:
    // Attend `count` tokens from `token` on, a run, for one KV head.
    // q, out: (tokens, KV_HEADS * GROUPS, SIZE) without gaps; keys, values: (rows, KV_HEADS, length, SIZE).
    void attend(const float* q, const float* keys, const float* values, float* out, Seen seen, int64_t token,
                int64_t count, int64_t head, int64_t length, float scale) {
        const int64_t from = (seen.rows[token] * KV_HEADS + head) * length * SIZE;
        const int64_t place = (token * KV_HEADS + head) * GROUPS * SIZE;
        if (count > 1) {
            together_.attend(q + place, keys + from, values + from, out + place, seen.first + token, seen.end + token,
                             count, scale);
            return;
        }
        const int64_t begin = from + seen.first[token] * SIZE, keys_seen = seen.end[token] - seen.first[token];
        const int64_t padded = (keys_seen + LANES - 1) / LANES * LANES;
        scores_.resize(GROUPS * padded);
        score(q + place, keys + begin, scores_.data(), keys_seen, padded, scale);
        for (int group = 0; group < GROUPS; group++) soften(scores_.data() + group * padded, keys_seen, padded);
        gather(scores_.data(), values + begin, out + place, keys_seen, padded);
    }

  private:
    std::vector<float> scores_;
    Together together_;
};

}  // namespace
