// Attention of tokens, each over its own row of KV cache, and the writing of new keys and values.
//
// Compiled at load for one model and one machine: SIZE (of a head), GROUPS (query heads of one KV head) and KV_HEADS
// are given as macros, so that every inner loop has a fixed length.  Plain C++ with the vector types of GCC and Clang.
// Scores are kept whole: one pass for them, one for their softmax, one for the values.  A token by itself is bound by
// the reading of its keys; neighbouring tokens of one row share that, and are two products of matrices.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 8;
constexpr int VECTORS = SIZE / LANES;
// Sums of values that stay in registers at a time; 16 vector registers are what AVX2 has.
constexpr int BLOCK = GROUPS * 4 <= 12 && VECTORS % 4 == 0 ? 4 : GROUPS * 2 <= 12 && VECTORS % 2 == 0 ? 2 : 1;
static_assert(SIZE % LANES == 0, "a head fills whole vectors");

// A product keeps QUERIES x PANEL sums in 12 of 16 registers; two vectors of one factor and a number of the other fit.
constexpr int PANEL = 2 * LANES;
constexpr int QUERIES = 6;
// Tokens that are attended to together: enough queries for the laying out of keys to be cheap, few enough to share out.
constexpr int TOKENS = SIZE % PANEL == 0 && GROUPS <= 24 ? 48 / GROUPS : 1;
constexpr int MOST = (TOKENS * GROUPS + QUERIES - 1) / QUERIES * QUERIES;
// Keys whose values stay in the first-level cache while all queries take them.
constexpr int64_t KEYS = 64;

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

// Softmax in place of the scores from `first` to `end`; the others of `padded` become 0.
void soften(float* scores, int64_t first, int64_t end, int64_t padded) {
    std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
    std::fill(scores + end, scores + padded, -std::numeric_limits<float>::infinity());
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

// c += a b, with c (QUERIES, PANEL), a (QUERIES, depth) and b (depth, PANEL); each has the given distance of its lines.
void multiply(const float* a, int64_t a_line, const float* b, int64_t b_line, float* c, int64_t c_line, int64_t depth) {
    Vector sums[QUERIES][2];
    for (int query = 0; query < QUERIES; query++)
        for (int half = 0; half < 2; half++) sums[query][half] = load(c + query * c_line + half * LANES);
    for (int64_t place = 0; place < depth; place++) {
        const Vector left = load(b + place * b_line), right = load(b + place * b_line + LANES);
        for (int query = 0; query < QUERIES; query++) {
            const float factor = a[query * a_line + place];
            sums[query][0] += left * factor;
            sums[query][1] += right * factor;
        }
    }
    for (int query = 0; query < QUERIES; query++)
        for (int half = 0; half < 2; half++) store(c + query * c_line + half * LANES, sums[query][half]);
}

// Attention of up to TOKENS neighbouring tokens of one row, for one KV head.
class Together {
  public:
    // q and out: of the first token; first and end: what each looks at; keys and values: of the row, from its start.
    void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* first,
                const int64_t* end, int64_t tokens, float scale) {
        const int64_t begin = first[0], count = end[tokens - 1] - begin;
        lines_ = (tokens * GROUPS + QUERIES - 1) / QUERIES * QUERIES;
        padded_ = (count + PANEL - 1) / PANEL * PANEL;
        // Lines at a distance of a power of two would share few places of the cache.
        line_ = (padded_ / PANEL | 1) * PANEL;
        std::fill(queries_, queries_ + lines_ * SIZE, 0.0f);
        for (int64_t token = 0; token < tokens; token++)
            for (int part = 0; part < GROUPS * SIZE; part++)
                queries_[token * GROUPS * SIZE + part] = scale * q[token * KV_HEADS * GROUPS * SIZE + part];
        score(keys + begin * SIZE, count);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t line = token * GROUPS; line < (token + 1) * GROUPS; line++)
                soften(scores_.data() + line * line_, first[token] - begin, end[token] - begin, padded_);
        gather(values + begin * SIZE, count);
        for (int64_t token = 0; token < tokens; token++)
            std::copy_n(sums_ + token * GROUPS * SIZE, GROUPS * SIZE, out + token * KV_HEADS * GROUPS * SIZE);
    }

  private:
    void score(const float* keys, int64_t count) {
        scores_.assign(lines_ * line_, 0.0f);
        for (int64_t key = 0; key < padded_; key += PANEL) {
            for (int64_t lane = 0; lane < PANEL; lane++)
                for (int part = 0; part < SIZE; part++)
                    panel_[part * PANEL + lane] = key + lane < count ? keys[(key + lane) * SIZE + part] : 0.0f;
            for (int64_t line = 0; line < lines_; line += QUERIES)
                multiply(queries_ + line * SIZE, SIZE, panel_, PANEL, scores_.data() + line * line_ + key, line_, SIZE);
        }
    }

    void gather(const float* values, int64_t count) {
        std::fill(sums_, sums_ + lines_ * SIZE, 0.0f);
        for (int64_t key = 0; key < count; key += KEYS)
            for (int part = 0; part < SIZE; part += PANEL)
                for (int64_t line = 0; line < lines_; line += QUERIES)
                    multiply(scores_.data() + line * line_ + key, line_, values + key * SIZE + part, SIZE,
                             sums_ + line * SIZE + part, SIZE, std::min(KEYS, count - key));
    }

    int64_t lines_, padded_, line_;
    alignas(64) float queries_[MOST * SIZE], sums_[MOST * SIZE], panel_[SIZE * PANEL];
    std::vector<float> scores_;
};

}  // namespace

// q, out: (tokens, KV_HEADS * GROUPS, SIZE) without gaps; keys, values: one layer's (rows, KV_HEADS, length, SIZE).
// rows, first and end: (tokens,) the row of each token and the keys that it looks at; neither goes back within a row.
extern "C" void attend(const float* q, const float* keys, const float* values, float* out, const int64_t* rows,
                       const int64_t* first, const int64_t* end, int64_t tokens, int64_t length, float scale,
                       int threads) {
    std::vector<int64_t> begins;
    for (int64_t token = 0; token < tokens; token++) {
        const bool apart = token == 0 || rows[token] != rows[begins.back()];
        if (apart || token - begins.back() == TOKENS) begins.push_back(token);
    }
    const int64_t blocks = begins.size();
    begins.push_back(tokens);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores;
        Together together;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = blocks * KV_HEADS - 1; task >= 0; task--) {
            const int64_t token = begins[task / KV_HEADS], head = task % KV_HEADS;
            const int64_t block = begins[task / KV_HEADS + 1] - token;
            const int64_t from = (rows[token] * KV_HEADS + head) * length * SIZE;
            const int64_t place = (token * KV_HEADS + head) * GROUPS * SIZE;
            if (block > 1) {
                together.attend(q + place, keys + from, values + from, out + place, first + token, end + token, block,
                                scale);
                continue;
            }
            const int64_t begin = from + first[token] * SIZE, count = end[token] - first[token];
            const int64_t padded = (count + LANES - 1) / LANES * LANES;
            scores.resize(GROUPS * padded);
            score(q + place, keys + begin, scores.data(), count, padded, scale);
            for (int group = 0; group < GROUPS; group++) soften(scores.data() + group * padded, 0, count, padded);
            gather(scores.data(), values + begin, out + place, count, padded);
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
