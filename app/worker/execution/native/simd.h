// SIMD vectors of eight floats, by the vector extensions of GCC and Clang; narrower processors use several registers.

#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage only, so the vector-ABI warning (-Wpsabi) does not apply.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr int LANES = 8;

// Register tile of the microkernels, named as in BLIS: MR rows x NR columns.  Its accumulators fill 12 of AVX2's 16
// vector registers, which leaves room for two vectors of one operand and a broadcast of the other.
constexpr int NR = 2 * LANES;
constexpr int MR = 6;

typedef float f32x8 __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t i32x8 __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t u32x8 __attribute__((vector_size(LANES * sizeof(uint32_t))));
// NR accumulators.
typedef float f32x16 __attribute__((vector_size(NR * sizeof(float))));

inline f32x8 load(const float* from) {
    f32x8 vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(float* to, f32x8 vector) { std::memcpy(to, &vector, sizeof vector); }

inline f32x8 broadcast(float value) { return value - f32x8{}; }

// Elementwise maximum; the right operand where the left one is NaN.
inline f32x8 maximum(f32x8 left, f32x8 right) { return left > right ? left : right; }

// The place in each of up to 12 rows of a matrix that a microkernel reads next.  A pointer for each would be more than
// there are registers for addresses, so every third serves its two neighbours; the empty `asm` keeps the compiler from
// making twelve of them again.
template <int ROWS, class Number>
class RowCursor {
  public:
    RowCursor(const Number* matrix, int64_t stride)
        : first_(matrix),
          second_(matrix + (ROWS > 3 ? 3 * stride : 0)),
          third_(matrix + (ROWS > 6 ? 6 * stride : 0)),
          fourth_(matrix + (ROWS > 9 ? 9 * stride : 0)),
          stride_(stride) {}

    const Number* operator[](int row) const {
        const Number* from = row < 3 ? first_ : row < 6 ? second_ : row < 9 ? third_ : fourth_;
        return from + row % 3 * stride_;
    }

    void advance(int64_t step) {
        first_ += step;
        if constexpr (ROWS > 3) second_ += step;
        if constexpr (ROWS > 6) third_ += step;
        if constexpr (ROWS > 9) fourth_ += step;
        asm("" : "+r"(first_), "+r"(second_), "+r"(third_), "+r"(fourth_));
    }

  private:
    const Number *first_, *second_, *third_, *fourth_;
    int64_t stride_;
};

// Horizontal sum, always added in this order.
inline float reduce_sum(f32x8 vector) {
    return ((vector[0] + vector[4]) + (vector[1] + vector[5])) + ((vector[2] + vector[6]) + (vector[3] + vector[7]));
}

// e^x for x <= 0 with a relative error of about 1e-7; 0 below -86, NaN for NaN.  Cody-Waite reduction to 2^n e^r, n
// being added to the exponent bits, and a polynomial of degree 6 for e^r (interpolated at Chebyshev nodes) in Estrin's
// order, which has the shortest chain of dependent operations.
inline f32x8 exp_nonpositive(f32x8 x) {
    // Beyond 2^23 floats have no fraction bits: adding this rounds to an integer and leaves n in the lowest bits.
    const float rounder = 12582912.0f;
    const f32x8 rounded = x * 1.44269504088896341f + rounder;
    const f32x8 n = rounded - rounder;
    const f32x8 r = x - n * 0.693359375f + n * 2.12194440e-4f, square = r * r;
    const f32x8 high = 1.3934541e-3f * square + (8.3698696e-3f * r + 4.1666456e-2f);
    const f32x8 low = high * square + (1.6666499e-1f * r + 0.5f);
    const f32x8 polynomial = low * square + (r + 1.0f);
    // Unsigned, because the addition may wrap where x is below the range of results.
    u32x8 bits, exponent;
    std::memcpy(&bits, &polynomial, sizeof bits);
    std::memcpy(&exponent, &rounded, sizeof exponent);
    bits += exponent << 23;
    f32x8 result;
    std::memcpy(&result, &bits, sizeof result);
    return x < broadcast(-86.0f) ? f32x8{} : result;
}

}  // namespace
