// Attention of tokens, each over its own row of KV cache.
//
// A token by itself is bound by the reading of its keys (attention_decode.h); neighbouring tokens of one row share that reading
// (attention_prefill.h).

#pragma once

#include <algorithm>
#include <vector>

#include "attention_decode.h"
#include "attention_prefill.h"

namespace {

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
        alone_.attend(q + place, keys + from, values + from, out + place, seen.first[token], seen.end[token], scale);
    }

  private:
    Alone<NUMBER> alone_;
    Together together_;
};

}  // namespace
