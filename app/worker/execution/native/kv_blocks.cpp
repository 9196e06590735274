// Copies between a slot of the KV cache and blocks of the prefix cache, in all layers at once: a call for each layer
// takes longer than its copy.

#include <algorithm>
#include <cstring>

#include "abi.h"

// One layer's keys or values, contiguous: (slots, heads, length, token) and (blocks, heads, block_tokens, token).
struct BlockTensor {
    char *slots, *blocks;
    int64_t heads, token_bytes;
};

// Copy the tokens of a slot from `start` on to blocks, or with `restore` blocks to there; what would lie behind the end
// of the slot is left out.
extern "C" void llmk_copy_blocks(const BlockTensor* tensors, int64_t num_tensors, int64_t length, int64_t block_tokens,
                                 int64_t slot, int64_t start, const int64_t* blocks, int64_t num_blocks, int restore,
                                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t index = 0; index < num_tensors; index++) {
        const auto [slots, stored, heads, token_bytes] = tensors[index];
        for (int64_t head = 0; head < heads; head++) {
            char* row = slots + ((slot * heads + head) * length + start) * token_bytes;
            for (int64_t number = 0; number < num_blocks; number++) {
                const int64_t first = number * block_tokens, tokens = std::min(block_tokens, length - start - first);
                char* in_slot = row + first * token_bytes;
                char* in_block = stored + (blocks[number] * heads + head) * block_tokens * token_bytes;
                if (tokens > 0)
                    std::memcpy(restore ? in_slot : in_block, restore ? in_block : in_slot, tokens * token_bytes);
            }
        }
    }
}

// The layout table, see abi.h.

extern "C" const int64_t* llmk_layout_block_tensor() {
    typedef BlockTensor T;
    static const int64_t layout[] = {4, sizeof(T), LLMK_FIELD(T, slots), LLMK_FIELD(T, blocks), LLMK_FIELD(T, heads),
                                     LLMK_FIELD(T, token_bytes)};
    return layout;
}
