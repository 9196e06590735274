// Attention of tokens, each over its own row of KV cache.
//
// A token by itself is bound by the reading of its keys, and its scores are kept whole: one pass for them, one for their
// softmax, one for the values.  Neighbouring tokens of one row share that reading (together.h).

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "together.h"
#include "vectors.h"

namespace {

constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

// Scores of the queries of one KV head with all keys; `padded` is the room of one query's scores.
template <class Query>
void score(const Query* q, const NUMBER* keys, float* scores, int64_t count, int64_t padded, float scale) {
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

void gather(const float* weights, const NUMBER* values, NUMBER* out, int64_t count, int64_t padded) {
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
    template <class Query>
    void attend(const Query* q, const NUMBER* keys, const NUMBER* values, NUMBER* out, Seen seen, Run run, int64_t head,
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
