// Attention of the tokens of a packed batch, each over its own slot of the KV cache.
//
// A single token is bound by the reading of its keys (attention_decode.h); neighbouring tokens of one slot share that
// reading (attention_prefill.h).  In tiles all tokens go the second way, since a token's bits must not depend on its
// neighbours.

#pragma once

#include <algorithm>
#include <vector>

#include "attention_decode.h"
#include "attention_prefill.h"

namespace {

// The slot of each token and the keys from `begin_key` to `end_key` that it attends to, (tokens,) each.  Neither bound
// decreases from one token of a slot to its next.
struct AttentionMetadata {
    const int64_t *slots, *begin_key, *end_key;
};

// Neighbouring tokens of one slot, from `begin` to `end`.
struct TokenSegment {
    int64_t begin, end;
};

// Split the tokens of a batch into segments of one slot and at most MAX_TOKENS, the most expensive first, so that no
// thread starts one of those when the others have finished.
std::vector<TokenSegment> split_segments(const int64_t* slots, const int64_t* end_key, int64_t tokens) {
    std::vector<TokenSegment> segments;
    for (int64_t token = 0; token < tokens; token++) {
        const bool same_slot = token > 0 && slots[token] == slots[token - 1];
        if (!same_slot || token - segments.back().begin == MAX_TOKENS) segments.push_back({token, token});
        segments.back().end = token + 1;
    }
    const auto cost = [&](const TokenSegment& each) { return (each.end - each.begin) * end_key[each.end - 1]; };
    std::stable_sort(segments.begin(), segments.end(),
                     [&](const TokenSegment& left, const TokenSegment& right) { return cost(left) > cost(right); });
    return segments;
}

// The workspace of one thread.
class Attention {
  public:
    // tiles: whether products are computed in tiles (amx_tiles.h), where the shape allows it.
    explicit Attention(bool tiles = false) : tiles_(tiles && PrefillAttention::HAS_TILES), prefill_(tiles_) {}

    // Compute one segment for one KV head.
    // q, out: (tokens, NUM_KV_HEADS * QUERIES_PER_KV, HEAD_SIZE), contiguous; keys, values: one layer's
    // (slots, NUM_KV_HEADS, length, HEAD_SIZE).
    template <class Query>
    void attend(const Query* q, const kv_t* keys, const kv_t* values, kv_t* out, AttentionMetadata metadata,
                TokenSegment segment, int64_t kv_head, int64_t length, float scale) {
        const int64_t token = segment.begin, count = segment.end - segment.begin;
        const int64_t cache_offset = (metadata.slots[token] * NUM_KV_HEADS + kv_head) * length * HEAD_SIZE;
        const int64_t query_offset = (token * NUM_KV_HEADS + kv_head) * QUERIES_PER_KV * HEAD_SIZE;
        if (count > 1 || tiles_) {
            prefill_.attend(q + query_offset, keys + cache_offset, values + cache_offset, out + query_offset,
                            metadata.begin_key + token, metadata.end_key + token, count, scale);
            return;
        }
        decode_.attend(q + query_offset, keys + cache_offset, values + cache_offset, out + query_offset,
                       metadata.begin_key[token], metadata.end_key[token], scale);
    }

  private:
    bool tiles_;
    DecodeAttention<kv_t> decode_;
    PrefillAttention prefill_;
};

}  // namespace
