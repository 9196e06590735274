// Vectors of eight floats, by the extensions of GCC and Clang; a processor with narrower ones takes several.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8;

// A product keeps LINES x PANEL sums in 12 of 16 registers; two vectors of one factor and a number of the other fit.
constexpr int PANEL = 2 * LANES;
constexpr int LINES = 6;

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

}  // namespace
