// Attention against a naive softmax: single tokens and segments, windows, grouped heads, extreme scores.

#include "attention.cpp"
#include "reference.h"

namespace {

constexpr bool BF16 = std::is_same_v<kv_t, bfloat16>;
constexpr double TOLERANCE = BF16 ? 1e-2 : 1e-5;
constexpr int64_t HEADS = NUM_KV_HEADS * QUERIES_PER_KV;
constexpr int64_t SLOTS = 4, LENGTH = 260;
const float SCALE = 1 / std::sqrt(float(HEAD_SIZE));

struct Batch {
    std::vector<int64_t> slots, begin_key, end_key;

    // Tokens of one slot at the positions from `begin` to `end`.
    void add(int64_t slot, int64_t begin, int64_t end, int64_t window) {
        for (int64_t position = begin; position < end; position++) {
            slots.push_back(slot);
            begin_key.push_back(std::max<int64_t>(0, position + 1 - window));
            end_key.push_back(position + 1);
        }
    }

    int64_t tokens() const { return slots.size(); }
};

struct Cache {
    std::vector<kv_t> keys, values;

    Cache() {
        const int64_t size = SLOTS * NUM_KV_HEADS * LENGTH * HEAD_SIZE;
        keys = narrow_all<kv_t>(random_floats(size));
        values = narrow_all<kv_t>(random_floats(size));
    }

    static int64_t offset(int64_t slot, int64_t head, int64_t position) {
        return ((slot * NUM_KV_HEADS + head) * LENGTH + position) * HEAD_SIZE;
    }
};

// Whether the checks are made in tiles.
bool in_tiles = false;

// As llmk_attend, in tiles.
void attend_in_tiles(const Cache& cache, const std::vector<kv_t>& q, const Batch& batch, float scale, kv_t* out) {
    Attention attention(true);
    const AttentionMetadata metadata{batch.slots.data(), batch.begin_key.data(), batch.end_key.data()};
    for (TokenSegment segment : split_segments(metadata.slots, metadata.end_key, batch.tokens()))
        for (int64_t head = 0; head < NUM_KV_HEADS; head++)
            attention.attend(q.data(), cache.keys.data(), cache.values.data(), out, metadata, segment, head, LENGTH,
                             scale);
#ifdef LLMK_HAVE_TILES
    Tiles::release();
#endif
}

std::vector<kv_t> attend(const Cache& cache, const std::vector<kv_t>& q, const Batch& batch, float scale, int threads) {
    std::vector<kv_t> out(q.size(), narrow<kv_t>(NAN));
    if (in_tiles) {
        attend_in_tiles(cache, q, batch, scale, out.data());
        return out;
    }
    llmk_attend(q.data(), cache.keys.data(), cache.values.data(), out.data(), batch.slots.data(),
                batch.begin_key.data(), batch.end_key.data(), batch.tokens(), LENGTH, scale, threads);
    return out;
}

void check_against_reference(const Cache& cache, const Batch& batch, int threads) {
    const std::vector<kv_t> q = narrow_all<kv_t>(random_floats(batch.tokens() * HEADS * HEAD_SIZE));
    const std::vector<kv_t> out = attend(cache, q, batch, SCALE, threads);
    for (int64_t token = 0; token < batch.tokens(); token++)
        for (int64_t head = 0; head < HEADS; head++) {
            const int64_t at = (token * HEADS + head) * HEAD_SIZE, first = batch.begin_key[token];
            const int64_t from = Cache::offset(batch.slots[token], head / QUERIES_PER_KV, first);
            std::vector<double> query;
            for (int element = 0; element < HEAD_SIZE; element++) query.push_back(widen(q[at + element]));
            const std::vector<double> expected =
                reference_attention(query.data(), cache.keys.data() + from, cache.values.data() + from,
                                    batch.end_key[token] - first, HEAD_SIZE, HEAD_SIZE, SCALE);
            const double error = relative_error(out.data() + at, expected);
            CHECK(error <= TOLERANCE, "slot %d, keys %d to %d, head %d: an error of %g", int(batch.slots[token]),
                  int(first), int(batch.end_key[token]), int(head), error);
        }
}

// Any number of keys and of neighbouring tokens, with and without a sliding window.
void check_shapes(const Cache& cache) {
    for (int64_t window : {LENGTH, int64_t{37}}) {
        Batch batch;
        batch.add(3, 0, 1, window);
        batch.add(0, 6, 7, window);
        batch.add(2, LENGTH - 1, LENGTH, window);
        batch.add(1, 119, 122, window);
        batch.add(3, 1, 30, window);
        batch.add(0, 90, 200, window);
        batch.add(2, 0, 17, window);
        for (int threads : {1, 3}) check_against_reference(cache, batch, threads);
    }
}

// In bfloat16 a token's bits are the same in whatever segments its neighbours are computed.
void check_batch_invariance(const Cache& cache) {
    if (!BF16 || HEAD_SIZE % NR != 0) return;
    constexpr int64_t TOKENS = 150;
    const std::vector<kv_t> q = narrow_all<kv_t>(random_floats(TOKENS * HEADS * HEAD_SIZE));
    for (int64_t window : {LENGTH, int64_t{37}, int64_t{100}}) {
        Batch whole;
        whole.add(1, 0, TOKENS, window);
        const std::vector<kv_t> expected = attend(cache, q, whole, 0.7f, 2);
        for (int64_t size : {1, 7, 50})
            for (int64_t begin = 0; begin < TOKENS; begin += size) {
                const int64_t end = std::min(begin + size, TOKENS), stride = HEADS * HEAD_SIZE;
                Batch part;
                part.add(1, begin, end, window);
                const std::vector<kv_t> some(q.begin() + begin * stride, q.begin() + end * stride);
                const std::vector<kv_t> found = attend(cache, some, part, 0.7f, 2);
                CHECK(0 == std::memcmp(found.data(), expected.data() + begin * stride, found.size() * sizeof(kv_t)),
                      "tokens %d to %d have other bits than in one segment", int(begin), int(end));
            }
    }
}

// Scores that are equal, far above or below the others, or beyond float32 after scaling; single tokens and a segment.
void check_extreme_scores() {
    constexpr int64_t KEYS = 16, FAVOURITE = 5;
    Cache cache;
    for (int64_t head = 0; head < NUM_KV_HEADS; head++)
        for (int64_t key = 0; key < KEYS; key++)
            for (int64_t element = 0; element < HEAD_SIZE; element++) {
                cache.keys[Cache::offset(0, head, key) + element] = narrow<kv_t>(key == FAVOURITE ? 1.0f : 0.0f);
                cache.values[Cache::offset(0, head, key) + element] = narrow<kv_t>(float(key));
            }
    const float factors[] = {0.0f, 1e4f, -1e4f, 1e30f, -1e30f};
    const float others = (120.0f - FAVOURITE) / (KEYS - 1);
    const float expected[] = {7.5f, float(FAVOURITE), others, float(FAVOURITE), others};
    for (int64_t tokens : {1, 5})
        for (int64_t begin = 0; begin < 5; begin += tokens) {
            Batch batch;
            for (int64_t token = 0; token < tokens; token++) batch.add(0, KEYS - 1, KEYS, KEYS);
            std::vector<kv_t> q;
            for (int64_t at = 0; at < tokens * HEADS * HEAD_SIZE; at++)
                q.push_back(narrow<kv_t>(factors[begin + at / (HEADS * HEAD_SIZE)]));
            const std::vector<kv_t> out = attend(cache, q, batch, 1.0f, 1);
            for (size_t at = 0; at < out.size(); at++) {
                const float wanted = expected[begin + at / (HEADS * HEAD_SIZE)];
                CHECK(std::abs(widen(out[at]) - wanted) <= (BF16 ? 5e-3f : 1e-6f) * wanted, "%g instead of %g",
                      widen(out[at]), wanted);
            }
        }
}

// NaN in one slot, or behind the end of another, stays out of all others.
void check_isolation() {
    Cache cache;
    cache.keys[Cache::offset(1, 0, 3) + 2] = narrow<kv_t>(NAN);
    for (int64_t at = Cache::offset(2, 0, 17); at < Cache::offset(2, 1, 0); at++)
        cache.keys[at] = cache.values[at] = narrow<kv_t>(NAN);
    Batch batch;
    batch.add(0, 15, 16, LENGTH);
    batch.add(1, 15, 16, LENGTH);
    batch.add(2, 15, 17, LENGTH);
    const std::vector<kv_t> q = narrow_all<kv_t>(random_floats(batch.tokens() * HEADS * HEAD_SIZE));
    const std::vector<kv_t> out = attend(cache, q, batch, SCALE, 2);
    for (int64_t token = 0; token < batch.tokens(); token++) {
        bool finite = true;
        for (int64_t at = 0; at < HEADS * HEAD_SIZE; at++)
            finite = finite && std::isfinite(widen(out[token * HEADS * HEAD_SIZE + at]));
        CHECK(finite == (batch.slots[token] != 1), "token %d", int(token));
    }
}

void check_write_kv() {
    constexpr int64_t TOKENS = 3, HEAD_STRIDE = 4 * HEAD_SIZE, TOKEN_STRIDE = HEAD_SIZE + 5;
    Cache cache;
    std::vector<kv_t> expected = cache.keys;
    const std::vector<kv_t> states =
        narrow_all<kv_t>(random_floats((NUM_KV_HEADS - 1) * HEAD_STRIDE + 2 * TOKEN_STRIDE + HEAD_SIZE));
    const int64_t slots[TOKENS] = {3, 0, 0}, positions[TOKENS] = {LENGTH - 1, 0, 1};
    for (int64_t token = 0; token < TOKENS; token++)
        for (int64_t head = 0; head < NUM_KV_HEADS; head++)
            for (int64_t element = 0; element < HEAD_SIZE; element++)
                expected[Cache::offset(slots[token], head, positions[token]) + element] =
                    states[head * HEAD_STRIDE + token * TOKEN_STRIDE + element];
    llmk_write_kv(states.data(), HEAD_STRIDE, TOKEN_STRIDE, cache.keys.data(), slots, positions, TOKENS, LENGTH);
    CHECK(0 == std::memcmp(cache.keys.data(), expected.data(), expected.size() * sizeof(kv_t)), "keys differ");
}

}  // namespace

void check_all() {
    const Cache cache;
    check_shapes(cache);
    check_batch_invariance(cache);
    check_extreme_scores();
    check_isolation();
}

int main() {
    check_all();
    check_write_kv();
#ifdef LLMK_HAVE_TILES
    if (BF16) {
        in_tiles = true;
        check_all();
    }
#endif
}
