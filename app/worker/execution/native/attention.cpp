// Attention as torch's operator: what RowCache calls in every layer of a model that torch computes.

#include "attention.h"

// q, out: (tokens, KV_HEADS * GROUPS, SIZE) without gaps; keys, values: one layer's (rows, KV_HEADS, length, SIZE).
// rows, first and end: (tokens,) the row of each token and the keys that it looks at; neither goes back within a row.
extern "C" void attend(const NUMBER* q, const NUMBER* keys, const NUMBER* values, NUMBER* out, const int64_t* rows,
                       const int64_t* first, const int64_t* end, int64_t tokens, int64_t length, float scale,
                       int threads) {
    const std::vector<Run> all = runs(rows, end, tokens);
    const int64_t tasks = all.size() * KV_HEADS;
#pragma omp parallel num_threads(threads)
    {
        Attention attention;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++)
            attention.attend(q, keys, values, out, {rows, first, end}, all[task % all.size()], task / all.size(), length,
                             scale);
    }
}

// from: (KV_HEADS, tokens, SIZE), each head's numbers without gaps; to: one layer's (rows, KV_HEADS, length, SIZE).
extern "C" void keep(const NUMBER* from, int64_t head_stride, int64_t token_stride, NUMBER* to, const int64_t* rows,
                     const int64_t* positions, int64_t tokens, int64_t length) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < KV_HEADS; head++)
            std::memcpy(to + ((rows[token] * KV_HEADS + head) * length + positions[token]) * SIZE,
                        from + head * head_stride + token * token_stride, SIZE * sizeof(NUMBER));
}
