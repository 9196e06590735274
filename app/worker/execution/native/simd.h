// Vectors of eight floats, by the extensions of GCC and Clang; a processor with narrower ones takes several.

#pragma once

#include <cstdint>
#include <cstring>

// These functions are nobody else's: how they hand over vectors that the processor does not have is their own affair.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr int LANES = 8;

// A product keeps LINES x PANEL sums in 12 of 16 registers; two vectors of one factor and a number of the other fit.
constexpr int PANEL = 2 * LANES;
constexpr int LINES = 6;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Vector load(const float* from) {
    Vector it;
    std::memcpy(&it, from, sizeof it);
    return it;
}

inline void store(float* to, Vector it) { std::memcpy(to, &it, sizeof it); }

inline Vector all(float it) { return it - Vector{}; }

// Of each pair of numbers the greater; the right one where the left is NaN.
inline Vector greater(Vector left, Vector right) { return left > right ? left : right; }

inline float sum(Vector it) {
    return ((it[0] + it[4]) + (it[1] + it[5])) + ((it[2] + it[6]) + (it[3] + it[7]));
}

// e to the power of x <= 0, to about 1e-7; 0 below -86, NaN for NaN.  2^n, n being added to the bits of the exponent, times
// a polynomial of degree 6 of what is left (by Chebyshev's points), in the order that makes its steps wait least.
inline Vector exponential(Vector x) {
    // Beyond 2^23 floats have no fractions: this rounds, and leaves n in the last bits.
    const float rounder = 12582912.0f;
    const Vector rounded = x * 1.44269504088896341f + rounder;
    const Vector n = rounded - rounder;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f, square = r * r;
    const Vector high = 1.3934541e-3f * square + (8.3698696e-3f * r + 4.1666456e-2f);
    const Vector low = high * square + (1.6666499e-1f * r + 0.5f);
    const Vector p = low * square + (r + 1.0f);
    // Unsigned, for these may overflow where x is below what there is.
    Bits bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &rounded, sizeof power);
    bits += power << 23;
    Vector it;
    std::memcpy(&it, &bits, sizeof it);
    return x < all(-86.0f) ? Vector{} : it;
}

}  // namespace
