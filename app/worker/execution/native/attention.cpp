// Attention and KV cache writes for models whose other operators torch computes.

#include "abi.h"
#include "attention.h"

// q, out: (tokens, NUM_KV_HEADS * QUERIES_PER_KV, HEAD_SIZE), contiguous; keys, values: one layer's
// (slots, NUM_KV_HEADS, length, HEAD_SIZE); slots, begin_key, end_key: (tokens,), as in AttentionMetadata.
extern "C" void llmk_attend(const kv_t* q, const kv_t* keys, const kv_t* values, kv_t* out, const int64_t* slots,
                            const int64_t* begin_key, const int64_t* end_key, int64_t tokens, int64_t length,
                            float scale, int threads) {
    const std::vector<TokenSegment> segments = split_segments(slots, end_key, tokens);
    const int64_t count = segments.size(), tasks = count * NUM_KV_HEADS;
#pragma omp parallel num_threads(threads)
    {
        Attention attention;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++)
            attention.attend(q, keys, values, out, {slots, begin_key, end_key}, segments[task % count], task / count,
                             length, scale);
    }
}

// states: (NUM_KV_HEADS, tokens, HEAD_SIZE) with strides in elements, the last one 1; cache: one layer's keys or
// values, (slots, NUM_KV_HEADS, length, HEAD_SIZE); slots, positions: (tokens,).
extern "C" void llmk_write_kv(const kv_t* states, int64_t head_stride, int64_t token_stride, kv_t* cache,
                              const int64_t* slots, const int64_t* positions, int64_t tokens, int64_t length) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < NUM_KV_HEADS; head++)
            std::memcpy(cache + ((slots[token] * NUM_KV_HEADS + head) * length + positions[token]) * HEAD_SIZE,
                        states + head * head_stride + token * token_stride, HEAD_SIZE * sizeof(kv_t));
}
