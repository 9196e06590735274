// All layers of a model in one call: the forward pass of Llama and its relatives over rows of KV cache.
//
// Pre-norm blocks: RMSNorm, grouped attention with rotary positions, RMSNorm, SwiGLU.  The threads stay together from the
// first layer to the last and wait for each other between two steps of a layer, where torch would start them anew for
// each operator.  WEIGHT is the type of the layers' weights and HEAD that of the last product's, macros beside those of
// attention.h.  What goes from layer to layer is in float32, whatever the type of weights.

#include <cmath>

#include "attention.h"
#include "gemm_packed.h"

extern "C" {

// A layer's weights; null where it has no norm of its heads.
struct Layer {
    const float* attention_norm;
    Weights<WEIGHT> qkv;
    const float *q_norm, *k_norm;
    Weights<WEIGHT> o;
    const float* mlp_norm;
    Weights<WEIGHT> gate_up, down;
    // (rows, KV_HEADS, length, SIZE)
    NUMBER *keys, *values;
    // Keys that a token sees, itself included; 0 is no limit.
    int64_t window;
};

struct Model {
    const Layer* layers;
    int64_t count, hidden, inner, vocabulary, length;
    const float* last_norm;
    Weights<HEAD> head;
    float epsilon, scale;
    int threads;
};

struct Tokens {
    int64_t count;
    // (tokens, hidden): embeddings, and then what the layers add to them.
    float* x;
    // (tokens, SIZE)
    const float *cosines, *sines;
    const int64_t *rows, *positions;
    // Those of whom scores are wanted, ascending.
    const int64_t* wanted;
    int64_t wanted_count;
    // (wanted, vocabulary)
    float* scores;
    // (tokens, width()) of room.
    float* room;
};
}

namespace {

constexpr int64_t HEADS = KV_HEADS * GROUPS;
// Numbers of all query heads of a token, and of all its key heads.
constexpr int64_t QUERY_SIZE = HEADS * SIZE;
constexpr int64_t KEY_SIZE = KV_HEADS * SIZE;

// What products take.
typedef Kind<WEIGHT>::Input Input;
static_assert(std::is_same_v<Input, Kind<HEAD>::Input>, "both products take the same");

// out = x / sqrt(mean(x^2) + epsilon) * weight
template <class Output>
void normalize(const float* x, const float* weight, Output* out, int64_t size, float epsilon) {
    Vector squares = {};
    for (int64_t at = 0; at < size; at += LANES) {
        const Vector it = load(x + at);
        squares += it * it;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / size + epsilon);
    for (int64_t at = 0; at < size; at += LANES) store(out + at, load(x + at) * factor * load(weight + at));
}

// Turn a head by its position, in place: rotary embedding with halves as pairs (Su and others 2021).
void rotate(float* head, const float* cosines, const float* sines) {
    for (int left = 0, right = SIZE / 2; left < SIZE / 2; left++, right++) {
        const float first = head[left], second = head[right];
        head[left] = first * cosines[left] - second * sines[left];
        head[right] = second * cosines[right] + first * sines[right];
    }
}

// x / (1 + e^-x), by the exponential of a number that is not positive.
inline Vector silu(Vector x) {
    const Integers positive = x > Vector{};
    const Vector small = exponential(positive ? -x : x);
    return x * (positive ? all(1.0f) : small) / (small + 1.0f);
}

class Pass {
  public:
    Pass(const Model& model, const Tokens& tokens) : model_(model), tokens_(tokens) {
        const int64_t count = tokens.count;
        qkv_ = tokens.room;
        queries_ = qkv_ + count * (QUERY_SIZE + 2 * KEY_SIZE);
        // Room for floats, whatever their type.
        normed_ = (Input*)(queries_ + count * QUERY_SIZE);
        attended_ = normed_ + count * model.hidden;
        inner_ = attended_ + count * QUERY_SIZE;
        for (int64_t token = 0; token < count; token++) ends_.push_back(tokens.positions[token] + 1);
        first_.resize(count);
        runs_ = runs(tokens.rows, ends_.data(), count);
    }

    static int64_t width(const Model& model) { return model.hidden + 3 * QUERY_SIZE + 2 * KEY_SIZE + model.inner; }

    // To be called by every thread of a parallel region.
    void run() {
        Attention attention;
        int64_t count = tokens_.count;
        for (int64_t number = 0; number < model_.count; number++) {
            const Layer& layer = model_.layers[number];
            normalize_all(layer.attention_norm, count);
            linear<false>(normed_, layer.qkv, model_.hidden, QUERY_SIZE + 2 * KEY_SIZE, count, qkv_, model_.threads);
            place(layer);
            const bool last = number + 1 == model_.count;
            if (last && tokens_.wanted_count == 0) return;
            attend(layer, attention, last);
            if (last) {
                // From here on nobody looks at the other tokens.
                select();
                count = tokens_.wanted_count;
            }
            add(attended_, layer.o, QUERY_SIZE, count);
            normalize_all(layer.mlp_norm, count);
            gate(layer, count);
            add(inner_, layer.down, model_.inner, count);
        }
        normalize_all(model_.last_norm, count);
        linear<false>(normed_, model_.head, model_.hidden, model_.vocabulary, count, tokens_.scores, model_.threads);
    }

  private:
    void normalize_all(const float* weight, int64_t count) {
#pragma omp for
        for (int64_t token = 0; token < count; token++)
            normalize(tokens_.x + token * model_.hidden, weight, normed_ + token * model_.hidden, model_.hidden,
                      model_.epsilon);
    }

    // Norm and turn the heads of queries and keys, and write keys and values to their rows.
    void place(const Layer& layer) {
#pragma omp for
        for (int64_t token = 0; token < tokens_.count; token++) {
            float* heads = qkv_ + token * (QUERY_SIZE + 2 * KEY_SIZE);
            for (int64_t head = 0; head < HEADS + KV_HEADS; head++) {
                const float* norm = head < HEADS ? layer.q_norm : layer.k_norm;
                float* it = heads + head * SIZE;
                if (norm) normalize(it, norm, it, SIZE, model_.epsilon);
                rotate(it, tokens_.cosines + token * SIZE, tokens_.sines + token * SIZE);
            }
            std::copy_n(heads, QUERY_SIZE, queries_ + token * QUERY_SIZE);
            for (int64_t head = 0; head < KV_HEADS; head++) {
                const int64_t row = tokens_.rows[token] * KV_HEADS + head;
                const int64_t to = (row * model_.length + tokens_.positions[token]) * SIZE;
                const float *key = heads + QUERY_SIZE + head * SIZE, *value = key + KEY_SIZE;
                for (int64_t at = 0; at < SIZE; at += LANES) {
                    store(layer.keys + to + at, load(key + at));
                    store(layer.values + to + at, load(value + at));
                }
            }
            first_[token] = layer.window ? std::max<int64_t>(0, ends_[token] - layer.window) : 0;
        }
    }

    void attend(const Layer& layer, Attention& attention, bool last) {
        const int64_t tasks = runs_.size() * KV_HEADS;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const Run run = runs_[task % runs_.size()];
            if (last && !any_wanted(run)) continue;
            attention.attend(queries_, layer.keys, layer.values, attended_,
                             {tokens_.rows, first_.data(), ends_.data()}, run, task / runs_.size(), model_.length,
                             model_.scale);
        }
    }

    bool any_wanted(Run run) const {
        const int64_t* stop = tokens_.wanted + tokens_.wanted_count;
        const int64_t* found = std::lower_bound(tokens_.wanted, stop, run.begin);
        return found != stop && *found < run.end;
    }

    void select() {
#pragma omp single
        for (int64_t place = 0; place < tokens_.wanted_count; place++) {
            const int64_t token = tokens_.wanted[place];
            if (token == place) continue;
            std::copy_n(attended_ + token * QUERY_SIZE, QUERY_SIZE, attended_ + place * QUERY_SIZE);
            std::copy_n(tokens_.x + token * model_.hidden, model_.hidden, tokens_.x + place * model_.hidden);
        }
    }

    // x += a linear layer of `from`
    void add(const Input* from, Weights<WEIGHT> weights, int64_t depth, int64_t count) {
        linear<true>(from, weights, depth, model_.hidden, count, tokens_.x, model_.threads);
    }

    // inner = silu(gate) * up, whose panels lie one after the other; `inner` is a multiple of PANEL.
    void gate(const Layer& layer, int64_t count) {
        const int64_t depth = model_.hidden, inner = model_.inner;
        share_out(inner / PANEL, count, model_.threads, [&](int64_t panel, int64_t begin, int64_t end) {
            const int64_t first = panel * PANEL;
            by_lines<Kind<WEIGHT>::lines>(begin, end, [&](int64_t token, int64_t lines) {
                alignas(64) float sums[Kind<WEIGHT>::lines * 2 * PANEL];
                multiply(normed_ + token * depth, layer.gate_up.panels + first * depth, inner * depth, depth, lines,
                         sums);
                for (int64_t line = 0; line < lines; line++)
                    for (int64_t lane = 0; lane < PANEL; lane += LANES) {
                        const float* from = sums + 2 * line * PANEL + lane;
                        const Vector left = layer.gate_up.finish(load(from), first + lane);
                        const Vector right = layer.gate_up.finish(load(from + PANEL), inner + first + lane);
                        store(inner_ + (token + line) * inner + first + lane, silu(left) * right);
                    }
            });
        });
    }

    const Model& model_;
    const Tokens& tokens_;
    std::vector<int64_t> first_, ends_;
    std::vector<Run> runs_;
    float *qkv_, *queries_;
    Input *normed_, *attended_, *inner_;
};

}  // namespace

// Numbers of room that each token needs.
extern "C" int64_t width(const Model* model) { return Pass::width(*model); }

extern "C" void forward(const Model* model, const Tokens* tokens) {
    Pass pass(*model, *tokens);
#pragma omp parallel num_threads(model->threads)
    pass.run();
}
