// Packed linear layers against a naive product, in every type of weights.

#include "gemm_packed.cpp"
#include "reference.h"

namespace {

template <class Weight, class Activation>
using Function = void (*)(const Activation*, const Weight*, const float*, const float*, Activation*, int64_t, int64_t,
                          int64_t, int);

template <class Weight, class Activation>
std::vector<Activation> call(Function<Weight, Activation> function, const TestLinear<Weight>& layer,
                             const std::vector<Activation>& x, int threads) {
    const int64_t tokens = x.size() / layer.inputs;
    std::vector<Activation> out(tokens * layer.outputs, narrow<Activation>(NAN));
    const PackedWeights<Weight> weights = layer.weights();
    function(x.data(), weights.panels, weights.scales, weights.bias, out.data(), tokens, layer.inputs, layer.outputs,
             threads);
    return out;
}

template <class Weight, class Activation>
void check_layer(Function<Weight, Activation> function, int64_t inputs, int64_t outputs, bool bias) {
    const TestLinear<Weight> layer(inputs, outputs, bias);
    const std::vector<float> x = random_floats(130 * inputs);
    const std::vector<Activation> narrowed = narrow_all<Activation>(x);
    const std::vector<double> exact(x.begin(), x.end());
    const double half_ulp = std::is_same_v<Activation, bfloat16> ? 1.0 / 256 : 0.0;
    const std::vector<Activation> most = call(function, layer, narrowed, 3);
    for (int64_t tokens = 1; tokens <= 130; tokens += tokens == 33 ? 97 : 1) {
        const std::vector<Activation> some(narrowed.begin(), narrowed.begin() + tokens * inputs);
        const std::vector<Activation> found = call(function, layer, some, 1 + tokens % 3);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t output = 0; output < outputs; output++) {
                double magnitude;
                const double expected = layer.reference(exact.data() + token * inputs, output, &magnitude);
                const double error = std::abs(widen(found[token * outputs + output]) - expected);
                CHECK(error <= half_ulp * std::abs(expected) + 1e-6 * magnitude,
                      "%d tokens, %d inputs, %d outputs: token %d output %d is %g instead of %g", int(tokens),
                      int(inputs), int(outputs), int(token), int(output), widen(found[token * outputs + output]),
                      expected);
            }
        CHECK(0 == std::memcmp(found.data(), most.data(), found.size() * sizeof found[0]),
              "the bits of a token depend on the batch: %d of 130 tokens, %d inputs, %d outputs", int(tokens),
              int(inputs), int(outputs));
    }
}

template <class Weight, class Activation>
void check_type(Function<Weight, Activation> function, std::initializer_list<int64_t> inputs) {
    for (int64_t in : inputs)
        for (int64_t out : {1, 16, 31, 33, 70}) check_layer<Weight, Activation>(function, in, out, out % 2);
}

}  // namespace

int main() {
    check_type<float, float>(llmk_linear_f32, {1, 7, 51});
    check_type<int8_t, float>(llmk_linear_i8, {1, 7, 51});
#ifdef LLMK_HAVE_FLOAT16
    check_type<float16, float>(llmk_linear_f16, {1, 7, 51});
#endif
    check_type<bfloat16, bfloat16>(llmk_linear_bf16, {2, 14, 70});
}
