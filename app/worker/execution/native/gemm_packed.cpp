// A linear layer as torch's operator, for models whose layers torch computes.

#include "gemm_packed.h"

namespace {

template <class Weight, class Number>
void compute(const Number* x, Weights<Weight> weights, Number* out, int64_t tokens, int64_t depth, int64_t outputs,
             int threads) {
#pragma omp parallel num_threads(threads)
    linear<false>(x, weights, depth, outputs, tokens, out, threads);
}

}  // namespace

// x (tokens, depth), out (tokens, outputs), both without gaps; scales and bias (outputs,) or none.  Depth is even in
// bfloat16.
extern "C" void linear_floats(const float* x, const float* panels, const float* scales, const float* bias, float* out,
                              int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    compute<float>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}

extern "C" void linear_bytes(const float* x, const Byte* panels, const float* scales, const float* bias, float* out,
                             int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    compute<Byte>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}

#ifdef HALVES
extern "C" void linear_halves(const float* x, const Half* panels, const float* scales, const float* bias, float* out,
                              int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    compute<Half>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}
#endif

extern "C" void linear_bfloats(const Bfloat* x, const Bfloat* panels, const float* scales, const float* bias, Bfloat* out,
                               int64_t tokens, int64_t depth, int64_t outputs, int threads) {
    compute<Bfloat>(x, {panels, scales, bias}, out, tokens, depth, outputs, threads);
}
