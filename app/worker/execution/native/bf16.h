// bfloat16 numbers and dot products of pairs of them: two bfloat16 are multiplied with two others and accumulated in
// float32, by one instruction where the processor has it (AVX512_BF16), else emulated with float32 arithmetic.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

// The upper 16 bits of a float32.
struct bfloat16 {
    uint16_t bits;
};

// NR pairs of bfloat16.
typedef uint32_t bf16_pairs __attribute__((vector_size(NR * sizeof(uint32_t))));

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define LLMK_HAVE_AVX512_BF16 1
// Accumulators of a microkernel, in vectors: 24 of 32 registers.
constexpr int MAX_ACCUMULATORS = 24;
#else
// Each is two of 16 registers.
constexpr int MAX_ACCUMULATORS = 6;
#endif

inline f32x8 load(const bfloat16* from) {
#if defined(__AVX2__)
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    typedef uint16_t u16x8 __attribute__((vector_size(LANES * sizeof(uint16_t))));
    u16x8 halves;
    std::memcpy(&halves, from, sizeof halves);
    const u32x8 bits = __builtin_convertvector(halves, u32x8) << 16;
    f32x8 floats;
    std::memcpy(&floats, &bits, sizeof floats);
    return floats;
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* to, f32x8 vector) {
#if defined(LLMK_HAVE_AVX512_BF16)
    const __m128bh rounded = _mm256_cvtneps_pbh((__m256)vector);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    typedef uint16_t u16x8 __attribute__((vector_size(LANES * sizeof(uint16_t))));
    u32x8 bits;
    std::memcpy(&bits, &vector, sizeof bits);
    bits = vector == vector ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    const u16x8 rounded = __builtin_convertvector(bits >> 16, u16x8);
    std::memcpy(to, &rounded, sizeof rounded);
#endif
}

inline bfloat16 to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    return {static_cast<uint16_t>(bits >> 16)};
}

inline float to_float(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Two neighbouring bfloat16; the first is the lower half, as in memory.
inline uint32_t load_pair(const bfloat16* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}

inline f32x16 load_f32x16(const float* from) {
    f32x16 vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline bf16_pairs load_pairs(const bfloat16* from) {
    bf16_pairs pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
}

#if defined(LLMK_HAVE_AVX512_BF16)
// Interleave the first and the second half of a vector of 32 elements of 16 bits.
inline bf16_pairs interleave_halves(__m512i halves) {
    const __m512i indices = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (bf16_pairs)_mm512_permutexvar_epi16(indices, halves);
}
#endif

// Pairs (left[i], right[i]) of two vectors, (NR,) each.
inline bf16_pairs interleave(const bfloat16* left, const bfloat16* right) {
#if defined(LLMK_HAVE_AVX512_BF16)
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)left));
    return interleave_halves(_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)right), 1));
#else
    typedef uint16_t u16x16 __attribute__((vector_size(NR * sizeof(uint16_t))));
    u16x16 low, high;
    std::memcpy(&low, left, sizeof low);
    std::memcpy(&high, right, sizeof high);
    return __builtin_convertvector(low, bf16_pairs) | __builtin_convertvector(high, bf16_pairs) << 16;
#endif
}

// The same for floats, which are rounded to bfloat16.
inline bf16_pairs interleave(const float* left, const float* right) {
#if defined(LLMK_HAVE_AVX512_BF16)
    return interleave_halves((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(right), _mm512_loadu_ps(left)));
#else
    bfloat16 low[NR], high[NR];
    for (int lane = 0; lane < NR; lane += LANES) {
        store(low + lane, load(left + lane));
        store(high + lane, load(right + lane));
    }
    return interleave(low, high);
#endif
}

// accumulators[i] += pairs[i].first * factor.first + pairs[i].second * factor.second (VDPBF16PS).
inline void accumulate_dot(f32x16& accumulators, const bf16_pairs& pairs, uint32_t factor) {
#if defined(LLMK_HAVE_AVX512_BF16)
    accumulators = (f32x16)_mm512_dpbf16_ps((__m512)accumulators, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(factor));
#else
    const bf16_pairs low = pairs << 16, high = pairs & 0xffff0000u;
    const uint32_t low_factor = factor << 16, high_factor = factor & 0xffff0000u;
    f32x16 lows, highs;
    float left, right;
    std::memcpy(&lows, &low, sizeof lows);
    std::memcpy(&highs, &high, sizeof highs);
    std::memcpy(&left, &low_factor, sizeof left);
    std::memcpy(&right, &high_factor, sizeof right);
    accumulators += lows * left + highs * right;
#endif
}

// Where two panels begin that are prefetched line by line, while others are multiplied.
template <class Weight>
struct Ahead {
    const Weight* panel[2];
};

// Microkernel: c = a b, or c += a b with ACCUMULATE, of c (ROWS, PANELS * NR), a (ROWS, depth, 2) and
// b (depth, PANELS * NR, 2).  Strides are in elements; those of the last two dimensions of b are 2 and 1.  `ahead` is
// prefetched, unless it is null.
template <int ROWS, int PANELS, bool ACCUMULATE>
inline void gemm_microkernel(const bfloat16* a, int64_t a_row_stride, int64_t a_depth_stride, const bfloat16* b,
                             int64_t b_depth_stride, int64_t b_panel_stride, float* c, int64_t c_row_stride,
                             int64_t c_panel_stride, int64_t depth,
                             Ahead<bfloat16> ahead = {}) {
    const bool prefetch = ahead.panel[0] != nullptr;
    f32x16 accumulators[ROWS][PANELS] = {};
    for (int row = 0; ACCUMULATE && row < ROWS; row++)
        for (int panel = 0; panel < PANELS; panel++)
            accumulators[row][panel] = load_f32x16(c + row * c_row_stride + panel * c_panel_stride);
    RowCursor<ROWS, bfloat16> rows(a, a_row_stride);
    for (int64_t k = 0; k < depth; k++, rows.advance(a_depth_stride)) {
        bf16_pairs pairs[PANELS];
        for (int panel = 0; panel < PANELS; panel++) {
            if (prefetch) __builtin_prefetch(ahead.panel[panel % 2] + k * 2 * NR);
            pairs[panel] = load_pairs(b + k * b_depth_stride + panel * b_panel_stride);
        }
        for (int row = 0; row < ROWS; row++) {
            const uint32_t factor = load_pair(rows[row]);
            for (int panel = 0; panel < PANELS; panel++) accumulate_dot(accumulators[row][panel], pairs[panel], factor);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int panel = 0; panel < PANELS; panel++)
            std::memcpy(c + row * c_row_stride + panel * c_panel_stride, &accumulators[row][panel], sizeof(f32x16));
}

}  // namespace
