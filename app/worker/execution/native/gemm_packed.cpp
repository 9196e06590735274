// One packed linear layer at a time, for models whose other operators torch computes.

#include <cmath>
#include <vector>

#include "abi.h"
#include "gemm_packed.h"

namespace {

template <class Weight, class Activation>
void parallel_linear(const Activation* x, PackedWeights<Weight> weights, Activation* out, int64_t tokens, int64_t depth,
                     int64_t outputs, int threads) {
#pragma omp parallel num_threads(threads)
    linear<false>(x, weights, depth, outputs, tokens, out, {threads, false});
}

}  // namespace

// x (tokens, depth) and out (tokens, outputs), both contiguous; scales and bias (outputs,) or null.  The depth is even
// in bfloat16.
extern "C" void llmk_linear_f32(const float* x, const float* panels, const float* scales, const float* bias, float* out,
                                int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    parallel_linear<float>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}

extern "C" void llmk_linear_i8(const float* x, const int8_t* panels, const float* scales, const float* bias, float* out,
                               int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    parallel_linear<int8_t>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}

#ifdef LLMK_HAVE_FLOAT16
extern "C" void llmk_linear_f16(const float* x, const float16* panels, const float* scales, const float* bias,
                                float* out, int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    parallel_linear<float16>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}
#endif

extern "C" void llmk_linear_bf16(const bfloat16* x, const bfloat16* panels, const float* scales, const float* bias,
                                 bfloat16* out, int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    parallel_linear<bfloat16>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}

#ifdef LLMK_HAVE_TILES
// Ask Linux for the tiles, which it gives to the whole process, and try them out: 1 where a small product is that of
// panels, but for rounding.
extern "C" int llmk_tiles_work() {
    constexpr int64_t TOKENS = TILE_ROWS + 3, DEPTH = 2 * TILE_INPUTS + 6, SUMS = TOKENS * 2 * NR;
    if (!Tiles::permitted()) return 0;
    std::vector<bfloat16> x(TOKENS * DEPTH), panels(2 * NR * DEPTH);
    for (size_t at = 0; at < x.size(); at++) x[at] = to_bfloat16(at % 7 - 2.5f);
    for (size_t at = 0; at < panels.size(); at++) panels[at] = to_bfloat16(at % 11 - 4.5f);
    std::vector<float> sums(SUMS), expected(SUMS);
    const Ahead<bfloat16> ahead = {{panels.data(), panels.data()}};
    multiply_packed_tiles<Tiles>(x.data(), panels.data(), NR * DEPTH, DEPTH, TOKENS, sums.data(), ahead);
    Tiles::release();
    for (int64_t token = 0; token < TOKENS; token++)
        multiply_panels(x.data() + token * DEPTH, panels.data(), NR * DEPTH, DEPTH, 1,
                        expected.data() + token * 2 * NR, ahead);
    const auto close = [](float left, float right) { return std::abs(left - right) <= 1e-3f * (1 + std::abs(right)); };
    return std::equal(sums.begin(), sums.end(), expected.begin(), close);
}
#endif
