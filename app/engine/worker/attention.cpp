// Attention of tokens, each over its own row of KV cache, and the writing of new keys and values.
//
// Compiled at load for one model and one machine: SIZE (of a head), GROUPS (query heads of one KV head) and KV_HEADS
// are given as macros, so that every inner loop has a fixed length.  Plain C++ with the vector types of GCC and Clang.
// Scores are kept whole: one pass for them, one for their softmax, one for the values.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 8;
constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vector load(const float* from) {
    Vector it;
    std::memcpy(&it, from, sizeof it);
    return it;
}

inline void store(float* to, Vector it) { std::memcpy(to, &it, sizeof it); }

inline Vector all(float it) { return it - Vector{}; }

inline float sum(Vector it) {
    return ((it[0] + it[4]) + (it[1] + it[5])) + ((it[2] + it[6]) + (it[3] + it[7]));
}

// e to the power of x <= 0, by 2^n times a polynomial (Cephes' expf), to about 1e-7; 0 below -87, NaN for NaN.
inline Vector exponential(Vector x) {
    const Vector least = all(-87.0f);
    const Integers tiny = x < least;
    const Vector bounded = tiny ? least : x;
    const Integers n = __builtin_convertvector(bounded * 1.44269504088896341f - 0.5f, Integers);
    const Vector whole = __builtin_convertvector(n, Vector);
    const Vector r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers power = (n + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    return tiny ? Vector{} : p * scale;
}

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

// Softmax in place; what pads the scores becomes 0.
void soften(float* scores, int64_t count, int64_t padded) {
    float most = scores[0];
    for (int64_t key = 1; key < count; key++) most = scores[key] > most ? scores[key] : most;
    for (int64_t key = count; key < padded; key++) scores[key] = most - 1000.0f;
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

}  // namespace

// q and out: (tokens, KV_HEADS * GROUPS, SIZE) without gaps; keys and values: one layer's (rows, KV_HEADS, length, SIZE).
// rows, first and end: (tokens,) the row of each token and the keys that it looks at.
extern "C" void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* rows,
                       const int64_t* first, const int64_t* end, int64_t tokens, int64_t length, float scale,
                       int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tokens * KV_HEADS; task++) {
            const int64_t token = task / KV_HEADS, head = task % KV_HEADS;
            const int64_t count = end[token] - first[token], padded = (count + LANES - 1) / LANES * LANES;
            const int64_t from = ((rows[token] * KV_HEADS + head) * length + first[token]) * SIZE;
            const int64_t place = (token * KV_HEADS + head) * GROUPS * SIZE;
            scores.resize(GROUPS * padded);
            score(q + place, keys + from, scores.data(), count, padded, scale);
            for (int group = 0; group < GROUPS; group++) soften(scores.data() + group * padded, count, padded);
            gather(scores.data(), values + from, out + place, count, padded);
        }
    }
}

// from: (KV_HEADS, tokens, SIZE), each head's numbers without gaps; to: one layer's (rows, KV_HEADS, length, SIZE).
extern "C" void keep(const float* from, int64_t head_stride, int64_t token_stride, float* to, const int64_t* rows,
                     const int64_t* positions, int64_t tokens, int64_t length) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < KV_HEADS; head++)
            std::memcpy(to + ((rows[token] * KV_HEADS + head) * length + positions[token]) * SIZE,
                        from + head * head_stride + token * token_stride, SIZE * sizeof(float));
}
