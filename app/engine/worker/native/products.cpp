// A linear layer as torch's operator, for models whose layers torch computes.

#include "products.h"

// x (tokens, depth), out (tokens, outputs), both without gaps; bias (outputs,) or none.
extern "C" void linear_floats(const float* x, const float* weights, const float* bias, float* out, int64_t tokens,
                              int64_t depth, int64_t outputs, int threads) {
#pragma omp parallel num_threads(threads)
    linear<false>(x, weights, bias, depth, outputs, tokens, out, threads);
}

#ifdef HALVES
extern "C" void linear_halves(const float* x, const Half* weights, const float* bias, float* out, int64_t tokens,
                              int64_t depth, int64_t outputs, int threads) {
#pragma omp parallel num_threads(threads)
    linear<false>(x, weights, bias, depth, outputs, tokens, out, threads);
}
#endif
