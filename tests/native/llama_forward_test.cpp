// Forward passes of a small model against naive layers in double precision.

#include "llama_forward.cpp"
#include "reference.h"

namespace {

typedef std::vector<double> Vector;

constexpr double TOLERANCE = std::is_same_v<kv_t, bfloat16> ? 3e-2 : 1e-5;
constexpr int64_t HIDDEN = 40, INNER = 48, VOCABULARY = 53, SLOTS = 3, LENGTH = 150, LAYERS = 2;
constexpr float EPS = 1e-5f;
const float SCALE = 1 / std::sqrt(float(HEAD_SIZE));

// Weights of a norm that keep scores in a range where the softmax is not one-hot.
std::vector<float> random_norm(int64_t size) {
    std::vector<float> weight = random_floats(size);
    for (float& each : weight) each = 0.25f + each / 8;
    return weight;
}

struct TestLayer {
    // The last layer has a sliding window, and norms of its heads.
    bool last;
    TestLinear<weight_t> qkv{HIDDEN, QKV_SIZE, true}, o{QUERY_SIZE, HIDDEN, false};
    TestLinear<weight_t> gate_up{HIDDEN, 2 * INNER, true}, down{INNER, HIDDEN, false};
    std::vector<float> attention_norm = random_norm(HIDDEN), mlp_norm = random_norm(HIDDEN);
    std::vector<float> q_norm = random_floats(HEAD_SIZE), k_norm = random_floats(HEAD_SIZE);
    std::vector<kv_t> keys = std::vector<kv_t>(SLOTS * KEY_SIZE * LENGTH), values = keys;
    // By slot and position, all heads of a token.
    std::vector<double> exact_keys = Vector(SLOTS * LENGTH * KEY_SIZE), exact_values = exact_keys;

    explicit TestLayer(bool last) : last(last) {}

    DecoderLayer layer() {
        return {attention_norm.data(),
                qkv.weights(),
                last ? q_norm.data() : nullptr,
                last ? k_norm.data() : nullptr,
                o.weights(),
                mlp_norm.data(),
                gate_up.weights(),
                down.weights(),
                keys.data(),
                values.data(),
                last ? 20 : 0};
    }
};

// What an adapter adds to one linear layer; with rank 0 nothing.
struct TestLora {
    int64_t inputs, outputs, rank;
    LoraType type;
    std::vector<float> down = random_floats(rank * inputs), up = random_floats(rank * outputs);
    std::vector<char> stored_down, stored_up;
    static constexpr float SCALE = 0.75f;

    TestLora(int64_t inputs, int64_t outputs, int64_t rank, LoraType type)
        : inputs(inputs), outputs(outputs), rank(rank), type(type) {
#if defined(LLMK_HAVE_FLOAT16)
        if (type == LORA_FLOAT16) {
            pack<float16>(1);
            return;
        }
#endif
        if (type == LORA_BFLOAT16) {
            pack<bfloat16>(2);
            return;
        }
        this->type = LORA_FLOAT32;
        pack<float>(1);
    }

    // Ranks that are packed in pairs are filled up with zeros.
    template <class Weight>
    void pack(int64_t pair) {
        const int64_t packed_rank = (rank + pair - 1) / pair * pair;
        for (int64_t row = 0; row < packed_rank; row++)
            for (int64_t at = 0; at < inputs; at++) append<Weight>(stored_down, row < rank ? down[row * inputs + at] : 0);
        for (int64_t first = 0; first < outputs; first += LANES)
            for (int64_t row = 0; row < packed_rank; row += pair)
                for (int64_t lane = 0; lane < LANES; lane++)
                    for (int64_t each = row; each < row + pair; each++)
                        append<Weight>(stored_up, each < rank ? up[each * outputs + first + lane] : 0);
    }

    template <class Weight>
    static void append(std::vector<char>& to, float value) {
        const Weight number = narrow<Weight>(value);
        to.insert(to.end(), (const char*)&number, (const char*)(&number + 1));
    }

    LoraWeights weights() const {
        const int64_t packed_rank = type == LORA_BFLOAT16 ? rank + rank % 2 : rank;
        return {rank ? stored_down.data() : nullptr, rank ? stored_up.data() : nullptr, packed_rank, type, SCALE};
    }

    void add(const Vector& x, double* out) const {
        for (int64_t row = 0; row < rank; row++) {
            double reduced = 0;
            for (int64_t at = 0; at < inputs; at++) reduced += x[at] * down[row * inputs + at];
            for (int64_t at = 0; at < outputs; at++) out[at] += SCALE * reduced * up[row * outputs + at];
        }
    }
};

struct TestLoraLayer {
    TestLora q, k, v, o, gate, up, down;

    // Only queries, outputs of attention and `up` where it is not complete.
    TestLoraLayer(int64_t rank, bool complete, LoraType type, LoraType other)
        : q(HIDDEN, QUERY_SIZE, rank, type),
          k(HIDDEN, KEY_SIZE, complete ? rank + 1 : 0, other),
          v(HIDDEN, KEY_SIZE, complete ? rank : 0, type),
          o(QUERY_SIZE, HIDDEN, rank, type),
          gate(HIDDEN, INNER, complete ? rank : 0, other),
          up(HIDDEN, INNER, rank, type),
          down(INNER, HIDDEN, complete ? rank + 2 : 0, other) {}

    LoraLayer layer() const {
        return {q.weights(), k.weights(), v.weights(), o.weights(), gate.weights(), up.weights(), down.weights()};
    }
};

constexpr int64_t ADAPTER_RANK = 10;

struct TestAdapter {
    std::vector<TestLoraLayer> tests;
    std::vector<LoraLayer> layers;

    TestAdapter(int64_t rank, bool complete, LoraType type, LoraType other) {
        for (int64_t index = 0; index < LAYERS; index++) tests.emplace_back(rank, complete, type, other);
        for (const TestLoraLayer& layer : tests) layers.push_back(layer.layer());
    }
};

struct TestModel {
    TestAdapter first{3, true, LORA_BFLOAT16, LORA_FLOAT32}, second{8, false, LORA_FLOAT16, LORA_FLOAT16};
    std::vector<TestLayer> layers;
    TestLinear<LLMK_LM_HEAD_TYPE> lm_head{HIDDEN, VOCABULARY, false};
    std::vector<float> final_norm = random_norm(HIDDEN);

    TestModel() {
        for (int64_t index = 0; index < LAYERS; index++) layers.emplace_back(index + 1 == LAYERS);
    }
};

struct Token {
    int64_t slot, position;
    bool needs_logits;

    // The slots have an adapter each, but for the middle one.
    const TestAdapter* adapter(const TestModel& model) const {
        return slot == 0 ? &model.first : slot == 2 ? &model.second : nullptr;
    }
};

double angle(int64_t position, int64_t element) {
    return position * std::pow(10000.0, -2.0 * (element % (HEAD_SIZE / 2)) / HEAD_SIZE);
}

Vector norm(const double* x, const std::vector<float>& weight) {
    double squares = 0;
    for (size_t at = 0; at < weight.size(); at++) squares += x[at] * x[at] / weight.size();
    Vector out;
    for (size_t at = 0; at < weight.size(); at++) out.push_back(x[at] / std::sqrt(squares + EPS) * weight[at]);
    return out;
}

void rotate(double* head, int64_t position) {
    constexpr int64_t HALF = HEAD_SIZE / 2;
    const Vector before(head, head + HEAD_SIZE);
    for (int64_t at = 0; at < HEAD_SIZE; at++)
        head[at] = before[at] * std::cos(angle(position, at)) +
                   (at < HALF ? -before[at + HALF] : before[at - HALF]) * std::sin(angle(position, at));
}

void add(Vector& x, const Vector& more) {
    for (size_t at = 0; at < x.size(); at++) x[at] += more[at];
}

// One token through one layer; its keys and values are stored for the tokens after it.
void reference_layer(TestLayer& layer, const TestLoraLayer* adapter, const Token& token, Vector& x) {
    const Vector attention_input = norm(x.data(), layer.attention_norm);
    Vector qkv = layer.qkv.reference(attention_input);
    if (adapter) {
        adapter->q.add(attention_input, qkv.data());
        adapter->k.add(attention_input, qkv.data() + QUERY_SIZE);
        adapter->v.add(attention_input, qkv.data() + QUERY_SIZE + KEY_SIZE);
    }
    for (int64_t head = 0; head < NUM_HEADS + NUM_KV_HEADS; head++) {
        double* states = qkv.data() + head * HEAD_SIZE;
        if (layer.last) {
            const Vector normed = norm(states, head < NUM_HEADS ? layer.q_norm : layer.k_norm);
            std::copy(normed.begin(), normed.end(), states);
        }
        rotate(states, token.position);
    }
    const int64_t slot = token.slot * LENGTH * KEY_SIZE, place = slot + token.position * KEY_SIZE;
    std::copy_n(qkv.data() + QUERY_SIZE, KEY_SIZE, layer.exact_keys.data() + place);
    std::copy_n(qkv.data() + QUERY_SIZE + KEY_SIZE, KEY_SIZE, layer.exact_values.data() + place);
    Vector attended;
    const int64_t first = layer.last ? std::max<int64_t>(0, token.position - 19) : 0;
    for (int64_t head = 0; head < NUM_HEADS; head++) {
        const int64_t from = slot + first * KEY_SIZE + head / QUERIES_PER_KV * HEAD_SIZE;
        const Vector part =
            reference_attention(qkv.data() + head * HEAD_SIZE, layer.exact_keys.data() + from,
                                layer.exact_values.data() + from, token.position + 1 - first, KEY_SIZE, HEAD_SIZE, SCALE);
        attended.insert(attended.end(), part.begin(), part.end());
    }
    add(x, layer.o.reference(attended));
    if (adapter) adapter->o.add(attended, x.data());
    const Vector mlp_input = norm(x.data(), layer.mlp_norm);
    Vector gate_up = layer.gate_up.reference(mlp_input);
    if (adapter) {
        adapter->gate.add(mlp_input, gate_up.data());
        adapter->up.add(mlp_input, gate_up.data() + INNER);
    }
    Vector gated;
    for (int64_t at = 0; at < INNER; at++)
        gated.push_back(gate_up[at] / (1 + std::exp(-gate_up[at])) * gate_up[INNER + at]);
    add(x, layer.down.reference(gated));
    if (adapter) adapter->down.add(gated, x.data());
}

void check_pass(TestModel& model, const std::vector<Token>& tokens, int threads, bool adapted, bool tiles) {
    std::vector<DecoderLayer> layers;
    for (TestLayer& layer : model.layers) layers.push_back(layer.layer());
    const DecoderModel decoder{layers.data(),
                               LAYERS,
                               HIDDEN,
                               INNER,
                               VOCABULARY,
                               LENGTH,
                               model.final_norm.data(),
                               model.lm_head.weights(),
                               EPS,
                               SCALE,
                               threads,
                               tiles};
    const int64_t count = tokens.size();
    std::vector<float> hidden = random_floats(count * HIDDEN), cos, sin;
    std::vector<int64_t> slots, positions, indices;
    std::vector<Vector> expected;
    std::vector<const LoraLayer*> adapters;
    for (int64_t index = 0; index < count; index++) {
        const Token& token = tokens[index];
        slots.push_back(token.slot);
        positions.push_back(token.position);
        for (int64_t at = 0; at < HEAD_SIZE; at++) {
            cos.push_back(float(std::cos(angle(token.position, at))));
            sin.push_back(float(std::sin(angle(token.position, at))));
        }
        Vector x(hidden.begin() + index * HIDDEN, hidden.begin() + (index + 1) * HIDDEN);
        const TestAdapter* adapter = adapted ? token.adapter(model) : nullptr;
        adapters.push_back(adapter ? adapter->layers.data() : nullptr);
        for (int64_t layer = 0; layer < LAYERS; layer++)
            reference_layer(model.layers[layer], adapter ? &adapter->tests[layer] : nullptr, token, x);
        if (!token.needs_logits) continue;
        indices.push_back(index);
        expected.push_back(model.lm_head.reference(norm(x.data(), model.final_norm)));
    }
    std::vector<float> workspace(count * llmk_workspace_size(&decoder), NAN);
    std::vector<float> logits(indices.size() * VOCABULARY, NAN);
    const ForwardBatch batch{count,
                             hidden.data(),
                             cos.data(),
                             sin.data(),
                             slots.data(),
                             positions.data(),
                             indices.data(),
                             int64_t(indices.size()),
                             logits.data(),
                             workspace.data(),
                             adapted ? adapters.data() : nullptr,
                             adapted ? ADAPTER_RANK : 0};
    llmk_forward(&decoder, &batch);
    for (size_t index = 0; index < expected.size(); index++) {
        const double error = relative_error(logits.data() + index * VOCABULARY, expected[index]);
        CHECK(error <= TOLERANCE, "the logits of token %d of %d are wrong by %g", int(indices[index]), int(count), error);
    }
}

std::vector<Token> segment(int64_t slot, int64_t begin, int64_t end, bool needs_logits) {
    std::vector<Token> tokens;
    for (int64_t position = begin; position < end; position++)
        tokens.push_back({slot, position, needs_logits && (position % 3 == 0 || position + 1 == end)});
    return tokens;
}

std::vector<Token> operator+(std::vector<Token> left, const std::vector<Token>& right) {
    left.insert(left.end(), right.begin(), right.end());
    return left;
}

void check_model(int threads, bool adapted, bool tiles) {
    TestModel model;
    const auto check = [&](const std::vector<Token>& tokens) { check_pass(model, tokens, threads, adapted, tiles); };
    // Without logits only keys and values are computed.
    check(segment(0, 0, 9, false));
    check(segment(0, 9, 10, true) + segment(2, 0, 140, true));
    check(segment(0, 10, 11, true) + segment(2, 140, 141, false) + segment(1, 0, 5, true));
    check(segment(0, 11, 12, true) + segment(1, 5, 6, true) + segment(2, 141, 142, true));
}

}  // namespace

int main() {
    for (int threads : {1, 3})
        for (bool adapted : {false, true}) {
            check_model(threads, adapted, false);
#ifdef LLMK_HAVE_TILES
            check_model(threads, adapted, true);
#endif
        }
}
