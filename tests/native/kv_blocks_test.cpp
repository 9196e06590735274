// Copies between slots and blocks: layers of different sizes, blocks in any order, and a slot that ends within a block.

#include "kv_blocks.cpp"
#include "reference.h"

namespace {

constexpr int64_t SLOTS = 3, LENGTH = 21, BLOCKS = 6, BLOCK_TOKENS = 8;
constexpr char UNTOUCHED = 1;

// One layer's keys: each byte says which slot, head and token it is of.
struct Layer {
    int64_t heads, token_bytes;
    std::vector<char> slots, blocks;

    Layer(int64_t heads, int64_t token_bytes)
        : heads(heads),
          token_bytes(token_bytes),
          slots(SLOTS * heads * LENGTH * token_bytes),
          blocks(BLOCKS * heads * BLOCK_TOKENS * token_bytes, UNTOUCHED) {
        for (int64_t slot = 0; slot < SLOTS; slot++)
            for (int64_t head = 0; head < heads; head++)
                for (int64_t token = 0; token < LENGTH; token++) *at(slot, head, token) = value(slot, head, token);
    }

    static char value(int64_t slot, int64_t head, int64_t token) { return 2 + (slot * 3 + head) * LENGTH % 90 + token; }
    char* at(int64_t slot, int64_t head, int64_t token) {
        return slots.data() + ((slot * heads + head) * LENGTH + token) * token_bytes;
    }
    char* in_block(int64_t block, int64_t head, int64_t token) {
        return blocks.data() + ((block * heads + head) * BLOCK_TOKENS + token) * token_bytes;
    }
};

// Save slot 1 from `start` on, and restore all of it in slot 2, whose first tokens other blocks have.
void check_copies(int64_t start, int threads) {
    Layer layers[] = {{2, 12}, {1, 4}, {3, 2}};
    std::vector<BlockTensor> tensors;
    for (Layer& each : layers)
        tensors.push_back({each.slots.data(), each.blocks.data(), each.heads, each.token_bytes});
    const auto copy = [&](int64_t slot, int64_t from, std::vector<int64_t> blocks, int restore) {
        llmk_copy_blocks(tensors.data(), tensors.size(), LENGTH, BLOCK_TOKENS, slot, from, blocks.data(), blocks.size(),
                         restore, threads);
    };
    const std::vector<int64_t> all = start ? std::vector<int64_t>{4, 0, 2} : std::vector<int64_t>{5, 0, 2};
    if (start) copy(0, 0, {4}, false);
    copy(1, start, {all.begin() + start / BLOCK_TOKENS, all.end()}, false);
    copy(2, 0, all, true);
    for (Layer& each : layers)
        for (int64_t head = 0; head < each.heads; head++) {
            for (int64_t token = 0; token < LENGTH; token++) {
                const char expected = Layer::value(token < start ? 0 : 1, head, token);
                CHECK(expected == *each.at(2, head, token), "token %d of head %d", int(token), int(head));
                CHECK(Layer::value(1, head, token) == *each.at(1, head, token), "the slot that is saved changes");
            }
            CHECK(UNTOUCHED == *each.in_block(1, head, 0), "a block that is not named changes");
            CHECK(UNTOUCHED == *each.in_block(2, head, LENGTH % BLOCK_TOKENS), "a block has more than its slot");
        }
}

}  // namespace

int main() {
    for (int threads : {1, 3})
        for (int64_t start : {int64_t(0), BLOCK_TOKENS}) check_copies(start, threads);
}
