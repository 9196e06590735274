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
// Keys of a block, whose scores stay in the first-level cache.
constexpr int64_t KEYS = 120;

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

// Attention of up to TOKENS neighbouring tokens of one row, for one KV head.  Goes over the keys in blocks, whose scores
// never leave the first-level cache, and keeps what of the softmax is known so far (Dao and others 2022).  Scores lie by
// key, so that keys and values are both read as they are: all queries of a key side by side.
class Together {
  public:
    // q and out: of the first token; first and end: what each looks at; keys and values: of the row, from its start.
    void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* first,
                const int64_t* end, int64_t tokens, float scale) {
        const int64_t begin = first[0], count = end[tokens - 1] - begin;
        queries_ = tokens * GROUPS;
        line_ = (queries_ + PANEL - 1) / PANEL * PANEL;
        lay_out(q, first, end, tokens, begin, count, scale);
        std::fill(sums_, sums_ + MOST * SIZE, 0.0f);
        std::fill(totals_, totals_ + MOST, 0.0f);
        std::fill(mosts_, mosts_ + MOST, std::numeric_limits<float>::lowest());
        for (int64_t key = 0; key < count; key += KEYS) {
            const int64_t here = std::min(KEYS, count - key);
            score(keys + (begin + key) * SIZE, here);
            for (int64_t panel = 0; panel < line_; panel += PANEL) soften(panel, key, here);
            gather(values + (begin + key) * SIZE, here);
        }
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

    // Scores of a block, (keys, line_).
    void score(const float* keys, int64_t count) {
        for (int64_t key = 0; key < count; key += LINES) {
            const float* from = keys + key * SIZE;
            alignas(64) float last[LINES * SIZE];
            if (count - key < LINES) {
                std::fill(std::copy_n(from, (count - key) * SIZE, last), last + LINES * SIZE, 0.0f);
                from = last;
            }
            for (int64_t panel = 0; panel < line_; panel += PANEL)
                product<false>(from, SIZE, 1, panels_ + panel * SIZE, PANEL, scores_ + key * line_ + panel, line_,
                               SIZE);
        }
    }

    // Make the scores of a panel of queries, for `count` keys from `key` on, to exponentials of what each is less than its
    // most so far, 0 for keys not looked at; add these to the totals.
    void soften(int64_t panel, int64_t key, int64_t count) {
        for (int64_t query = panel; query < panel + PANEL; query += LANES) hide(query, key, count);
        float* scores = scores_ + panel;
        const int64_t line = line_;
        Vector before[2], most[2], total[2] = {};
        std::memcpy(before, mosts_ + panel, sizeof before);
        std::memcpy(most, before, sizeof most);
        for (int64_t place = 0; place < count; place++)
            for (int half = 0; half < 2; half++) most[half] = greater(load(scores + place * line + half * LANES), most[half]);
        for (int64_t place = 0; place < count; place++)
            for (int half = 0; half < 2; half++) {
                float* at = scores + place * line + half * LANES;
                const Vector weight = exponential(load(at) - most[half]);
                store(at, weight);
                total[half] += weight;
            }
        for (int half = 0; half < 2; half++) {
            const int64_t query = panel + half * LANES;
            const Vector kept = exponential(before[half] - most[half]);
            store(totals_ + query, load(totals_ + query) * kept + total[half]);
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
            store(at, (number >= first) & (number < end) ? load(at) : all(-std::numeric_limits<float>::infinity()));
        }
    }

    // Add the values of a block, as much of each as its exponential.
    void gather(const float* values, int64_t count) {
        for (int part = 0; part < SIZE; part += PANEL)
            for (int64_t query = 0; query < queries_; query += LINES)
                product<true>(scores_ + query, 1, line_, values + part, SIZE, sums_ + query * SIZE + part, SIZE, count);
    }

    int64_t queries_, line_;
    int32_t first_[MOST], end_[MOST];
    // The last products read and write beyond what is there.
    alignas(64) float scores_[(KEYS + LINES) * MOST];
    alignas(64) float panels_[MOST * SIZE], sums_[MOST * SIZE], totals_[MOST], mosts_[MOST];
};

// What each token of a pass looks at, (tokens,) each: its row, its first key and the one after its last.  Neither key
// goes back from one token of a row to its next.
struct Seen {
    const int64_t *rows, *first, *end;
};

// Neighbouring tokens of one row, from `begin` to `end`.
struct Run {
    int64_t begin, end;
};

// All tokens of a pass in runs that are not too long, those with the most to compute first, so that no thread begins with
// one when the others are done.  ends: what Seen has.
std::vector<Run> runs(const int64_t* rows, const int64_t* ends, int64_t tokens) {
    std::vector<Run> all;
    for (int64_t token = 0; token < tokens; token++) {
        const bool apart = token == 0 || rows[token] != rows[token - 1] || token - all.back().begin == TOKENS;
        if (apart) all.push_back({token, token});
        all.back().end = token + 1;
    }
    const auto work = [&](const Run& run) { return (run.end - run.begin) * ends[run.end - 1]; };
    std::stable_sort(all.begin(), all.end(), [&](const Run& one, const Run& other) { return work(one) > work(other); });
    return all;
}

// What one thread attends with.
class Attention {
  public:
    // Attend a run for one KV head.
    // q, out: (tokens, KV_HEADS * GROUPS, SIZE) without gaps; keys, values: (rows, KV_HEADS, length, SIZE).
    void attend(const float* q, const float* keys, const float* values, float* out, Seen seen, Run run, int64_t head,
                int64_t length, float scale) {
        const int64_t token = run.begin, count = run.end - run.begin;
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
