// The forward pass of Llama and its relatives over the KV cache: all decoder layers in one call.
//
// Pre-norm blocks: RMSNorm, grouped-query attention with rotary embeddings, RMSNorm, SwiGLU.  One parallel region spans
// all layers, with a barrier between two steps of a layer, where torch would start its threads for each operator.
// Beside the macros of attention_prefill.h, LLMK_WEIGHT_TYPE is the type of the layers' packed weights and
// LLMK_LM_HEAD_TYPE that of the output projection.  Hidden states are float32 whatever the type of weights.

#include <cmath>
#include <initializer_list>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "gemm_packed.h"
#include "lora.h"

typedef WeightTraits<LLMK_WEIGHT_TYPE>::activation activation_t;

extern "C" {

// Python mirrors the following structures (native_decoder.py).

struct DecoderLayer {
    const float* attention_norm;
    PackedWeights<LLMK_WEIGHT_TYPE> qkv;
    // (HEAD_SIZE,) each, or null where heads are not normed.
    const float *q_norm, *k_norm;
    PackedWeights<LLMK_WEIGHT_TYPE> o;
    const float* mlp_norm;
    PackedWeights<LLMK_WEIGHT_TYPE> gate_up, down;
    // (slots, NUM_KV_HEADS, length, HEAD_SIZE)
    kv_t *keys, *values;
    // Keys that a token attends to, itself included; 0 for no limit.
    int64_t sliding_window;
};

struct DecoderModel {
    const DecoderLayer* layers;
    // `length` is that of a slot, in tokens.
    int64_t num_layers, hidden_size, intermediate_size, vocab_size, length;
    const float* final_norm;
    PackedWeights<LLMK_LM_HEAD_TYPE> lm_head;
    float rms_norm_eps, softmax_scale;
    int32_t num_threads;
    // Whether products are computed in tiles (amx_tiles.h).
    int32_t tiles;
};

// An adapter's weights for one layer.
struct LoraLayer {
    LoraWeights q, k, v, o, gate, up, down;
};

struct ForwardBatch {
    int64_t num_tokens;
    // (tokens, hidden_size): embeddings on entry; the residual stream.
    float* hidden_states;
    // (tokens, HEAD_SIZE)
    const float *cos, *sin;
    // (tokens,)
    const int64_t *slots, *positions;
    // (num_logits,) ascending: the tokens whose logits are computed.
    const int64_t* logits_indices;
    int64_t num_logits;
    // (num_logits, vocab_size)
    float* logits;
    // num_tokens * llmk_workspace_size() floats.
    float* workspace;
    // (tokens,) the layers of each token's adapter, null for a token without one; null where no token has one.
    const LoraLayer* const* adapters;
    // The highest rank of any of them.
    int64_t adapter_rank;
};
}

namespace {

constexpr int64_t NUM_HEADS = NUM_KV_HEADS * QUERIES_PER_KV;
// Elements of all query heads of a token, and of all its key heads.
constexpr int64_t QUERY_SIZE = NUM_HEADS * HEAD_SIZE;
constexpr int64_t KEY_SIZE = NUM_KV_HEADS * HEAD_SIZE;
constexpr int64_t QKV_SIZE = QUERY_SIZE + 2 * KEY_SIZE;

typedef LLMK_WEIGHT_TYPE weight_t;
static_assert(std::is_same_v<activation_t, WeightTraits<LLMK_LM_HEAD_TYPE>::activation>,
              "the layers and the output projection take the same activations");

// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight.
template <class Output>
void rms_norm(const float* x, const float* weight, Output* out, int64_t size, float eps) {
    f32x8 squares = {};
    for (int64_t at = 0; at < size; at += LANES) {
        const f32x8 vector = load(x + at);
        squares += vector * vector;
    }
    const float factor = 1.0f / std::sqrt(reduce_sum(squares) / size + eps);
    for (int64_t at = 0; at < size; at += LANES) store(out + at, load(x + at) * factor * load(weight + at));
}

// Rotary embedding of one head in place, element i paired with i + HEAD_SIZE / 2 (Su and others 2021).
void apply_rotary_embedding(float* head, const float* cos, const float* sin) {
    for (int left = 0, right = HEAD_SIZE / 2; left < HEAD_SIZE / 2; left++, right++) {
        const float first = head[left], second = head[right];
        head[left] = first * cos[left] - second * sin[left];
        head[right] = second * cos[right] + first * sin[right];
    }
}

// x / (1 + e^-x), with e^-|x| so that the exponent is never positive.
inline f32x8 silu(f32x8 x) {
    const i32x8 positive = x > f32x8{};
    const f32x8 exponential = exp_nonpositive(positive ? -x : x);
    return x * (positive ? broadcast(1.0f) : exponential) / (exponential + 1.0f);
}

class ForwardPass {
  public:
    ForwardPass(const DecoderModel& model, const ForwardBatch& batch)
        : model_(model), batch_(batch), execution_{model.num_threads, model.tiles != 0} {
        const int64_t count = batch.num_tokens;
        qkv_ = batch.workspace;
        queries_ = qkv_ + count * QKV_SIZE;
        // Activations may be narrower than the float32 that the workspace is sized for.
        normed_ = (activation_t*)(queries_ + count * QUERY_SIZE);
        attended_ = normed_ + count * model.hidden_size;
        gated_ = attended_ + count * QUERY_SIZE;
        execution_.split = split_activations_of(gated_ + count * model.intermediate_size);
        for (int64_t token = 0; token < count; token++) end_key_.push_back(batch.positions[token] + 1);
        begin_key_.resize(count);
        segments_ = split_segments(batch.slots, end_key_.data(), count);
        if (batch.adapters) {
            adapters_.assign(batch.adapters, batch.adapters + count);
            reduced_.resize(count * reduced_stride());
            group_by_adapter(count);
        }
    }

    static int64_t workspace_size(const DecoderModel& model) {
        const int64_t size = QKV_SIZE + QUERY_SIZE + model.hidden_size + QUERY_SIZE + model.intermediate_size;
        if (!model.tiles || !is_split<weight_t>) return size;
        const int64_t depth = std::max({model.hidden_size, QUERY_SIZE, model.intermediate_size});
        return size + (split_size(depth) * sizeof(bfloat16) + CACHE_LINE) / sizeof(float);
    }

    // Must be called by every thread of the parallel region.
    void run() {
        Attention attention(model_.tiles != 0);
        int64_t count = batch_.num_tokens;
        for (int64_t index = 0; index < model_.num_layers; index++) {
            const DecoderLayer& layer = model_.layers[index];
            norm_tokens(layer.attention_norm, count);
            reduce(index, normed_, model_.hidden_size, {&LoraLayer::q, &LoraLayer::k, &LoraLayer::v});
            linear<false>(normed_, layer.qkv, model_.hidden_size, QKV_SIZE, count, qkv_, execution_,
                          LoraEpilogue{this,
                                       index,
                                       {{&LoraLayer::q, 0, QUERY_SIZE},
                                        {&LoraLayer::k, 1, KEY_SIZE},
                                        {&LoraLayer::v, 2, KEY_SIZE}}});
            rotate_and_write_kv(layer);
            const bool last = index + 1 == model_.num_layers;
            if (last && batch_.num_logits == 0) return;
            attend(layer, attention, last);
            if (last) {
                // Only the tokens whose logits are needed go on.
                compact_tokens();
                count = batch_.num_logits;
            }
            add_linear(index, attended_, layer.o, QUERY_SIZE, count, &LoraLayer::o);
            norm_tokens(layer.mlp_norm, count);
            reduce(index, normed_, model_.hidden_size, {&LoraLayer::gate, &LoraLayer::up});
            swiglu(index, count);
            add_linear(index, gated_, layer.down, model_.intermediate_size, count, &LoraLayer::down);
        }
        norm_tokens(model_.final_norm, count);
        linear<false>(normed_, model_.lm_head, model_.hidden_size, model_.vocab_size, count, batch_.logits,
                      execution_);
    }

  private:
    static constexpr int64_t CACHE_LINE = 64;

    // The first whole cache line of the rest of the workspace.
    static bfloat16* split_activations_of(activation_t* rest) {
        return (bfloat16*)(((uintptr_t)rest + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    }

    // Linear layers that read the same input: queries, keys and values.
    static constexpr int64_t MAX_SHARED_INPUT = 3;

    typedef LoraWeights LoraLayer::*LoraMember;

    // A linear layer, its place among those that read the same input, and how many of the outputs that lie side by side
    // are its own.
    struct LoraTarget {
        LoraMember member;
        int64_t place, outputs;
    };

    // Consecutive tokens, up to LORA_TOKENS, that have one adapter.
    struct LoraGroup {
        const LoraLayer* layers;
        int64_t begin, end;
    };

    void group_by_adapter(int64_t count) {
        groups_.clear();
        for (int64_t token = 0; token < count; token++) {
            const LoraLayer* layers = adapters_[token];
            if (!groups_.empty() && groups_.back().layers == layers && groups_.back().end == token &&
                token - groups_.back().begin < LORA_TOKENS)
                groups_.back().end++;
            else if (layers)
                groups_.push_back({layers, token, token + 1});
        }
    }

    int64_t reduced_stride() const { return MAX_SHARED_INPUT * batch_.adapter_rank; }

    activation_t* reduced(int64_t token, int64_t place) {
        return reduced_.data() + token * reduced_stride() + place * batch_.adapter_rank;
    }

    // Multiply x with the `down` weights of linear layers that read it; ends with a barrier.
    void reduce(int64_t layer, const activation_t* x, int64_t depth, std::initializer_list<LoraMember> members) {
        if (adapters_.empty()) return;
        const int64_t places = members.size(), tasks = groups_.size() * places;
#pragma omp for
        for (int64_t task = 0; task < tasks; task++) {
            const LoraGroup group = groups_[task / places];
            const int64_t place = task % places;
            reduce_ranks(x + group.begin * depth, group.layers[layer].*members.begin()[place], depth,
                         group.end - group.begin, reduced(group.begin, place), reduced_stride());
        }
    }

    // Linear layers that read the same input, and whose outputs lie side by side.
    typedef std::initializer_list<LoraTarget> LoraTargets;

    // Call `body(group, target, first output, outputs, sums)` for all that adapters add to a tile of linear layers.
    template <class Body>
    void for_lora_of(const LinearTile& tile, LoraTargets targets, Body body) {
        if (adapters_.empty()) return;
        auto group = std::lower_bound(groups_.begin(), groups_.end(), tile.first_token,
                                      [](const LoraGroup& each, int64_t token) { return each.end <= token; });
        for (; group != groups_.end() && group->begin < tile.first_token + tile.tokens; group++) {
            int64_t begin = 0;
            for (const LoraTarget& target : targets) {
                const int64_t first = std::max(tile.first_output, begin);
                const int64_t end = std::min(tile.first_output + tile.outputs, begin + target.outputs);
                if (first < end)
                    body(*group, target, first - begin, end - first, tile.sums + first - tile.first_output);
                begin += target.outputs;
            }
        }
    }

    // Prefetch the `up` weights that `expand` will read.
    void prefetch(int64_t layer, const LinearTile& tile, LoraTargets targets) {
        for_lora_of(tile, targets,
                    [&](const LoraGroup& group, LoraTarget target, int64_t first, int64_t outputs, float*) {
                        prefetch_up(group.layers[layer].*target.member, first, outputs);
                    });
    }

    // Add the products with the `up` weights to a tile of linear layers.
    void expand(int64_t layer, const LinearTile& tile, LoraTargets targets) {
        for_lora_of(tile, targets,
                    [&](const LoraGroup& group, LoraTarget target, int64_t first, int64_t outputs, float* sums) {
            const int64_t begin = std::max(tile.first_token, group.begin);
            const int64_t end = std::min(tile.first_token + tile.tokens, group.end);
            expand_ranks(reduced(begin, target.place), reduced_stride(), group.layers[layer].*target.member, first,
                         outputs, end - begin, {sums + (begin - tile.first_token) * tile.stride, tile.stride});
        });
    }

    // The epilogue of a linear layer.
    struct LoraEpilogue {
        ForwardPass* pass;
        int64_t layer;
        LoraTargets targets;

        void prefetch(const LinearTile& tile) const { pass->prefetch(layer, tile, targets); }
        void apply(const LinearTile& tile) const { pass->expand(layer, tile, targets); }
    };

    void norm_tokens(const float* weight, int64_t count) {
#pragma omp for
        for (int64_t token = 0; token < count; token++)
            rms_norm(batch_.hidden_states + token * model_.hidden_size, weight, normed_ + token * model_.hidden_size,
                     model_.hidden_size, model_.rms_norm_eps);
    }

    // Norm and rotate the heads of queries and keys, write keys and values to their slots, and set the key ranges.
    void rotate_and_write_kv(const DecoderLayer& layer) {
#pragma omp for
        for (int64_t token = 0; token < batch_.num_tokens; token++) {
            float* heads = qkv_ + token * QKV_SIZE;
            for (int64_t head = 0; head < NUM_HEADS + NUM_KV_HEADS; head++) {
                const float* norm = head < NUM_HEADS ? layer.q_norm : layer.k_norm;
                float* states = heads + head * HEAD_SIZE;
                if (norm) rms_norm(states, norm, states, HEAD_SIZE, model_.rms_norm_eps);
                apply_rotary_embedding(states, batch_.cos + token * HEAD_SIZE, batch_.sin + token * HEAD_SIZE);
            }
            std::copy_n(heads, QUERY_SIZE, queries_ + token * QUERY_SIZE);
            write_kv(layer, token, heads + QUERY_SIZE);
            begin_key_[token] =
                layer.sliding_window ? std::max<int64_t>(0, end_key_[token] - layer.sliding_window) : 0;
        }
    }

    // states: the keys and then the values of all KV heads of a token.
    void write_kv(const DecoderLayer& layer, int64_t token, const float* states) {
        for (int64_t head = 0; head < NUM_KV_HEADS; head++) {
            const int64_t row = batch_.slots[token] * NUM_KV_HEADS + head;
            const int64_t to = (row * model_.length + batch_.positions[token]) * HEAD_SIZE;
            const float *key = states + head * HEAD_SIZE, *value = key + KEY_SIZE;
            for (int64_t at = 0; at < HEAD_SIZE; at += LANES) {
                store(layer.keys + to + at, load(key + at));
                store(layer.values + to + at, load(value + at));
            }
        }
    }

    void attend(const DecoderLayer& layer, Attention& attention, bool last) {
        const int64_t count = segments_.size(), tasks = count * NUM_KV_HEADS;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const TokenSegment segment = segments_[task % count];
            if (last && !needs_logits(segment)) continue;
            attention.attend(queries_, layer.keys, layer.values, attended_,
                             {batch_.slots, begin_key_.data(), end_key_.data()}, segment, task / count, model_.length,
                             model_.softmax_scale);
        }
    }

    bool needs_logits(TokenSegment segment) const {
        const int64_t* end = batch_.logits_indices + batch_.num_logits;
        const int64_t* found = std::lower_bound(batch_.logits_indices, end, segment.begin);
        return found != end && *found < segment.end;
    }

    // Move the tokens whose logits are needed to the front.
    void compact_tokens() {
#pragma omp single
        {
            for (int64_t index = 0; index < batch_.num_logits; index++) {
                const int64_t token = batch_.logits_indices[index];
                if (token == index) continue;
                if (!adapters_.empty()) adapters_[index] = adapters_[token];
                std::copy_n(attended_ + token * QUERY_SIZE, QUERY_SIZE, attended_ + index * QUERY_SIZE);
                std::copy_n(batch_.hidden_states + token * model_.hidden_size, model_.hidden_size,
                            batch_.hidden_states + index * model_.hidden_size);
            }
            if (!adapters_.empty()) group_by_adapter(batch_.num_logits);
        }
    }

    // hidden_states += a linear layer of x, with its adapters
    void add_linear(int64_t index, const activation_t* x, PackedWeights<weight_t> weights, int64_t depth, int64_t count,
                    LoraMember member) {
        reduce(index, x, depth, {member});
        linear<true>(x, weights, depth, model_.hidden_size, count, batch_.hidden_states, execution_,
                     LoraEpilogue{this, index, {{member, 0, model_.hidden_size}}});
    }

    // gated = silu(gate) * up.  The panels of up follow those of gate; intermediate_size is a multiple of NR, so that a
    // panel of each makes a pair.
    void swiglu(int64_t index, int64_t count) {
        const DecoderLayer& layer = model_.layers[index];
        const int64_t depth = model_.hidden_size, inner = model_.intermediate_size;
        const Inputs<weight_t> inputs{normed_, count, depth};
        inputs.split(execution_);
        const auto compute = [&](int64_t panel, int64_t next, TokenGroup group) {
            const int64_t first = panel * NR;
            alignas(64) float sums[MAX_GROUP<weight_t> * 2 * NR];
            const weight_t* panels = layer.gate_up.panels;
            const LinearTile gates{group.begin, group.count, first, NR, sums, 2 * NR};
            const LinearTile ups{group.begin, group.count, first, NR, sums + NR, 2 * NR};
            prefetch(index, gates, {{&LoraLayer::gate, 0, inner}});
            prefetch(index, ups, {{&LoraLayer::up, 0, inner}});
            multiply<weight_t>(inputs, {panels + first * depth, panels + next * NR * depth, inner * depth}, group,
                               sums, execution_);
            for (int64_t row = 0; row < group.count; row++)
                for (int64_t lane = 0; lane < NR; lane += LANES) {
                    float* gate = sums + 2 * row * NR + lane;
                    store(gate, layer.gate_up.apply_scale_and_bias(load(gate), first + lane));
                    store(gate + NR, layer.gate_up.apply_scale_and_bias(load(gate + NR), inner + first + lane));
                }
            expand(index, gates, {{&LoraLayer::gate, 0, inner}});
            expand(index, ups, {{&LoraLayer::up, 1, inner}});
            for (int64_t row = 0; row < group.count; row++)
                for (int64_t lane = 0; lane < NR; lane += LANES) {
                    const float* gate = sums + 2 * row * NR + lane;
                    store(gated_ + (group.begin + row) * inner + first + lane, silu(load(gate)) * load(gate + NR));
                }
        };
        parallel_for_groups<weight_t>(inner / NR, count, execution_, compute);
    }

    const DecoderModel& model_;
    const ForwardBatch& batch_;
    Execution execution_;
    std::vector<int64_t> begin_key_, end_key_;
    std::vector<TokenSegment> segments_;
    float *qkv_, *queries_;
    activation_t *normed_, *attended_, *gated_;
    // The layers of each token's adapter; empty where no token has one.
    std::vector<const LoraLayer*> adapters_;
    std::vector<LoraGroup> groups_;
    // (tokens, MAX_SHARED_INPUT, adapter_rank) inputs of the `up` weights.
    std::vector<activation_t> reduced_;
};

}  // namespace

// Floats of workspace for each token.
extern "C" int64_t llmk_workspace_size(const DecoderModel* model) { return ForwardPass::workspace_size(*model); }

extern "C" void llmk_forward(const DecoderModel* model, const ForwardBatch* batch) {
    ForwardPass pass(*model, *batch);
#pragma omp parallel num_threads(model->num_threads)
    {
        pass.run();
#ifdef LLMK_HAVE_TILES
        if (model->tiles) Tiles::release();
#endif
    }
}

// The layout tables, see abi.h.

extern "C" const int64_t* llmk_layout_packed_weights() {
    typedef PackedWeights<LLMK_WEIGHT_TYPE> T;
    static const int64_t layout[] = {3, sizeof(T), LLMK_FIELD(T, panels), LLMK_FIELD(T, scales), LLMK_FIELD(T, bias)};
    return layout;
}

extern "C" const int64_t* llmk_layout_decoder_layer() {
    typedef DecoderLayer T;
    static const int64_t layout[] = {11, sizeof(T), LLMK_FIELD(T, attention_norm), LLMK_FIELD(T, qkv),
                                     LLMK_FIELD(T, q_norm), LLMK_FIELD(T, k_norm), LLMK_FIELD(T, o),
                                     LLMK_FIELD(T, mlp_norm), LLMK_FIELD(T, gate_up), LLMK_FIELD(T, down),
                                     LLMK_FIELD(T, keys), LLMK_FIELD(T, values), LLMK_FIELD(T, sliding_window)};
    return layout;
}

extern "C" const int64_t* llmk_layout_decoder_model() {
    typedef DecoderModel T;
    static const int64_t layout[] = {12, sizeof(T), LLMK_FIELD(T, layers), LLMK_FIELD(T, num_layers),
                                     LLMK_FIELD(T, hidden_size), LLMK_FIELD(T, intermediate_size),
                                     LLMK_FIELD(T, vocab_size), LLMK_FIELD(T, length), LLMK_FIELD(T, final_norm),
                                     LLMK_FIELD(T, lm_head), LLMK_FIELD(T, rms_norm_eps), LLMK_FIELD(T, softmax_scale),
                                     LLMK_FIELD(T, num_threads), LLMK_FIELD(T, tiles)};
    return layout;
}

extern "C" const int64_t* llmk_layout_lora_weights() {
    typedef LoraWeights T;
    static const int64_t layout[] = {5, sizeof(T), LLMK_FIELD(T, down), LLMK_FIELD(T, up), LLMK_FIELD(T, rank),
                                     LLMK_FIELD(T, type), LLMK_FIELD(T, scale)};
    return layout;
}

extern "C" const int64_t* llmk_layout_lora_layer() {
    typedef LoraLayer T;
    static const int64_t layout[] = {7, sizeof(T), LLMK_FIELD(T, q), LLMK_FIELD(T, k), LLMK_FIELD(T, v),
                                     LLMK_FIELD(T, o), LLMK_FIELD(T, gate), LLMK_FIELD(T, up), LLMK_FIELD(T, down)};
    return layout;
}

extern "C" const int64_t* llmk_layout_forward_batch() {
    typedef ForwardBatch T;
    static const int64_t layout[] = {12, sizeof(T), LLMK_FIELD(T, num_tokens), LLMK_FIELD(T, hidden_states),
                                     LLMK_FIELD(T, cos), LLMK_FIELD(T, sin), LLMK_FIELD(T, slots),
                                     LLMK_FIELD(T, positions), LLMK_FIELD(T, logits_indices),
                                     LLMK_FIELD(T, num_logits), LLMK_FIELD(T, logits), LLMK_FIELD(T, workspace),
                                     LLMK_FIELD(T, adapters), LLMK_FIELD(T, adapter_rank)};
    return layout;
}
