// One packed linear layer at a time, for models whose other operators torch computes.

#include "abi.h"
#include "gemm_packed.h"

namespace {

template <class Weight, class Activation>
void parallel_linear(const Activation* x, PackedWeights<Weight> weights, Activation* out, int64_t tokens, int64_t depth,
                     int64_t outputs, int threads, bool tiles = false) {
#pragma omp parallel num_threads(threads)
    linear<false>(x, weights, depth, outputs, tokens, out, {threads, tiles});
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
