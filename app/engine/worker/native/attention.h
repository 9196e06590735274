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

constexpr int QUERIES = LINES;
// Tokens that are attended to together: enough queries for the laying out of keys to be cheap, few enough to share out.
constexpr int TOKENS = SIZE % PANEL == 0 && GROUPS <= 24 ? 48 / GROUPS : 1;
constexpr int MOST = (TOKENS * GROUPS + QUERIES - 1) / QUERIES * QUERIES;
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

// Softmax in place of the scores from `first` to `end`; the others of `padded` become 0.
void soften(float* scores, int64_t first, int64_t end, int64_t padded) {
    std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
    std::fill(scores + end, scores + padded, -std::numeric_limits<float>::infinity());
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

// c += a b, with c (QUERIES, PANEL), a (QUERIES, depth) and b (depth, PANEL); each has the given distance of its lines.
void multiply(const float* a, int64_t a_line, const float* b, int64_t b_line, float* c, int64_t c_line, int64_t depth) {
    Vector sums[QUERIES][2];
    for (int query = 0; query < QUERIES; query++)
        for (int half = 0; half < 2; half++) sums[query][half] = load(c + query * c_line + half * LANES);
    for (int64_t place = 0; place < depth; place++) {
        const Vector left = load(b + place * b_line), right = load(b + place * b_line + LANES);
        for (int query = 0; query < QUERIES; query++) {
            const float factor = a[query * a_line + place];
            sums[query][0] += left * factor;
            sums[query][1] += right * factor;
        }
    }
    for (int query = 0; query < QUERIES; query++)
        for (int half = 0; half < 2; half++) store(c + query * c_line + half * LANES, sums[query][half]);
}

// Attention of up to TOKENS neighbouring tokens of one row, for one KV head.
class Together {
  public:
    // q and out: of the first token; first and end: what each looks at; keys and values: of the row, from its start.
    void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* first,
                const int64_t* end, int64_t tokens, float scale) {
        const int64_t begin = first[0], count = end[tokens - 1] - begin;
        lines_ = (tokens * GROUPS + QUERIES - 1) / QUERIES * QUERIES;
        padded_ = (count + PANEL - 1) / PANEL * PANEL;
        // Lines at a distance of a power of two would share few places of the cache.
        line_ = (padded_ / PANEL | 1) * PANEL;
        std::fill(queries_, queries_ + lines_ * SIZE, 0.0f);
        for (int64_t token = 0; token < tokens; token++)
            for (int part = 0; part < GROUPS * SIZE; part++)
                queries_[token * GROUPS * SIZE + part] = scale * q[token * KV_HEADS * GROUPS * SIZE + part];
        score(keys + begin * SIZE, count);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t line = token * GROUPS; line < (token + 1) * GROUPS; line++)
                soften(scores_.data() + line * line_, first[token] - begin, end[token] - begin, padded_);
        gather(values + begin * SIZE, count);
        for (int64_t token = 0; token < tokens; token++)
            std::copy_n(sums_ + token * GROUPS * SIZE, GROUPS * SIZE, out + token * KV_HEADS * GROUPS * SIZE);
    }

  private:
    void score(const float* keys, int64_t count) {
        scores_.assign(lines_ * line_, 0.0f);
        for (int64_t key = 0; key < padded_; key += PANEL) {
            for (int64_t lane = 0; lane < PANEL; lane++)
                for (int part = 0; part < SIZE; part++)
                    panel_[part * PANEL + lane] = key + lane < count ? keys[(key + lane) * SIZE + part] : 0.0f;
            for (int64_t line = 0; line < lines_; line += QUERIES)
                multiply(queries_ + line * SIZE, SIZE, panel_, PANEL, scores_.data() + line * line_ + key, line_, SIZE);
        }
    }

    void gather(const float* values, int64_t count) {
        std::fill(sums_, sums_ + lines_ * SIZE, 0.0f);
        for (int64_t key = 0; key < count; key += KEYS)
            for (int part = 0; part < SIZE; part += PANEL)
                for (int64_t line = 0; line < lines_; line += QUERIES)
                    multiply(scores_.data() + line * line_ + key, line_, values + key * SIZE + part, SIZE,
                             sums_ + line * SIZE + part, SIZE, std::min(KEYS, count - key));
    }

    int64_t lines_, padded_, line_;
    alignas(64) float queries_[MOST * SIZE], sums_[MOST * SIZE], panel_[SIZE * PANEL];
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
        for (int group = 0; group < GROUPS; group++) soften(scores_.data() + group * padded, 0, keys_seen, padded);
        gather(scores_.data(), values + begin, out + place, keys_seen, padded);
    }

  private:
    std::vector<float> scores_;
    Together together_;
};

}  // namespace
