// Packed linear layers against a naive product, in every type of weights, and in tiles.

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
    const std::vector<float> x = random_floats(130 * inputs, random_bits<Activation>);
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

#ifdef LLMK_HAVE_TILES
// As llmk_linear_*, in tiles.
template <class Weight, class Activation>
void linear_in_tiles(const Activation* x, const Weight* panels, const float* scales, const float* bias, Activation* out,
                     int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    std::vector<bfloat16> split(tokens * split_size(depth), to_bfloat16(NAN));
#pragma omp parallel num_threads(threads)
    {
        linear<false>(x, PackedWeights<Weight>{panels, scales, bias}, depth, outputs, tokens, out,
                      {threads, true, split.data()});
        Tiles::release();
    }
}

// Odd inputs, and more than are widened at a time.
template <class Weight>
void check_split() {
    check_type<Weight, float>(linear_in_tiles<Weight, float>, {1, 7, 51});
    check_layer<Weight, float>(linear_in_tiles<Weight, float>, WIDENED_INPUTS<Weight> + 45, 33, true);
}

// |found - exact| / |exact| of all results of a layer.
template <class Weight>
double error_of(Function<Weight, float> function, const TestLinear<Weight>& layer, const std::vector<float>& x) {
    const std::vector<float> found = call(function, layer, x, 1);
    std::vector<double> exact;
    for (size_t first = 0; first < x.size(); first += layer.inputs)
        for (int64_t output = 0; output < layer.outputs; output++)
            exact.push_back(layer.reference(std::vector<double>(&x[first], &x[first] + layer.inputs).data(), output));
    return relative_error(found.data(), exact);
}

// Splitting loses less than the sums of panels do.
template <class Weight>
void check_error(Function<Weight, float> panels) {
    const TestLinear<Weight> layer(600, 33, false);
    const std::vector<float> x = random_floats(40 * layer.inputs, random_bits<float>);
    const double allowed = error_of(panels, layer, x), error = error_of(linear_in_tiles<Weight, float>, layer, x);
    CHECK(error <= allowed, "tiles are wrong by %g, panels by %g", error, allowed);
}
#endif

// A tile sums even and odd inputs by themselves and rounds only there, before it adds them to what it has.
void check_emulated_tiles() {
    const std::vector<bfloat16> x = narrow_all<bfloat16>(random_floats(3 * 40));
    const std::vector<bfloat16> left = narrow_all<bfloat16>(random_floats(TILE_INPUTS * NR)), right(left.size());
    EmulatedTiles tiles(3);
    float sums[3][2 * NR];
    for (int64_t times = 1; times <= 2; times++) {
        tiles.load_weights(left.data(), right.data(), 2 * NR);
        tiles.multiply(x.data(), 40);
        tiles.store(sums[0]);
        for (int64_t token = 0; token < 3; token++)
            for (int64_t output = 0; output < NR; output++) {
                double expected = 0;
                for (int64_t input = 0; input < TILE_INPUTS; input++)
                    expected += times * widen(x[token * 40 + input]) *
                                widen(left[input / 2 * 2 * NR + 2 * output + input % 2]);
                CHECK(expected == sums[token][output] && 0.0f == sums[token][NR + output],
                      "token %d output %d is %g instead of %g", int(token), int(output), sums[token][output], expected);
            }
    }
}

}  // namespace

int main() {
    check_emulated_tiles();
    check_type<float, float>(llmk_linear_f32, {1, 7, 51});
    check_type<int8_t, float>(llmk_linear_i8, {1, 7, 51});
#ifdef LLMK_HAVE_FLOAT16
    check_type<float16, float>(llmk_linear_f16, {1, 7, 51});
#endif
    check_type<bfloat16, bfloat16>(llmk_linear_bf16, {2, 14, 70});
#ifdef LLMK_HAVE_TILES
    CHECK(llmk_tiles_work(), "tiles and panels differ");
    check_type<bfloat16, bfloat16>(linear_in_tiles<bfloat16, bfloat16>, {2, 64, 70});
    check_split<float>();
    check_split<int8_t>();
    check_error<float>(llmk_linear_f32);
    check_error<int8_t>(llmk_linear_i8);
#ifdef LLMK_HAVE_FLOAT16
    check_split<float16>();
    check_error<float16>(llmk_linear_f16);
#endif
#endif
}
