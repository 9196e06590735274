// Numbers in bfloat16, and products of pairs of them: two numbers of 16 bits are multiplied with two others and added to a
// float32, in one instruction where a processor has it (AVX512_BF16), else as floats.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

// The upper half of a float32.
struct Bfloat {
    uint16_t bits;
};

// As many numbers as a panel has outputs, and as many pairs.
typedef float Wide __attribute__((vector_size(PANEL * sizeof(float))));
typedef uint32_t Pairs __attribute__((vector_size(PANEL * sizeof(uint32_t))));

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define PAIRS_IN_HARDWARE 1
// Vectors of sums of a product: of 32 registers.
constexpr int SUMS = 24;
#else
// Each is two of 16 registers.
constexpr int SUMS = 6;
#endif

inline Vector load(const Bfloat* from) {
#if defined(__AVX2__)
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    typedef uint16_t Shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));
    Shorts it;
    std::memcpy(&it, from, sizeof it);
    const Bits bits = __builtin_convertvector(it, Bits) << 16;
    Vector floats;
    std::memcpy(&floats, &bits, sizeof floats);
    return floats;
#endif
}

// Rounds to the nearest, to even where two are; NaN stays one.
inline void store(Bfloat* to, Vector it) {
#if defined(PAIRS_IN_HARDWARE)
    const __m128bh rounded = _mm256_cvtneps_pbh((__m256)it);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    typedef uint16_t Shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));
    Bits bits;
    std::memcpy(&bits, &it, sizeof bits);
    bits = it == it ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    const Shorts rounded = __builtin_convertvector(bits >> 16, Shorts);
    std::memcpy(to, &rounded, sizeof rounded);
#endif
}

inline Bfloat rounded(float it) {
    uint32_t bits;
    std::memcpy(&bits, &it, sizeof bits);
    bits = it == it ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    return {static_cast<uint16_t>(bits >> 16)};
}

inline float number(Bfloat it) {
    const uint32_t bits = static_cast<uint32_t>(it.bits) << 16;
    float floating;
    std::memcpy(&floating, &bits, sizeof floating);
    return floating;
}

// Two neighbours as one; the first is the lower half, as it is in memory.
inline uint32_t pair(const Bfloat* from) {
    uint32_t it;
    std::memcpy(&it, from, sizeof it);
    return it;
}

inline Wide load_wide(const float* from) {
    Wide it;
    std::memcpy(&it, from, sizeof it);
    return it;
}

inline Pairs load_pairs(const Bfloat* from) {
    Pairs it;
    std::memcpy(&it, from, sizeof it);
    return it;
}

#if defined(PAIRS_IN_HARDWARE)
// The first half of a vector of 32 numbers of 16 bits and the second, as pairs of one and the other.
inline Pairs interleaved(__m512i halves) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                            5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Pairs)_mm512_permutexvar_epi16(places, halves);
}
#endif

// `left` and `right`, (PANEL,) each, as pairs of one and the other.
inline Pairs paired(const Bfloat* left, const Bfloat* right) {
#if defined(PAIRS_IN_HARDWARE)
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)left));
    return interleaved(_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)right), 1));
#else
    typedef uint16_t Shorts __attribute__((vector_size(PANEL * sizeof(uint16_t))));
    Shorts low, high;
    std::memcpy(&low, left, sizeof low);
    std::memcpy(&high, right, sizeof high);
    return __builtin_convertvector(low, Pairs) | __builtin_convertvector(high, Pairs) << 16;
#endif
}

// The same of floats, rounded.
inline Pairs paired(const float* left, const float* right) {
#if defined(PAIRS_IN_HARDWARE)
    return interleaved((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(right), _mm512_loadu_ps(left)));
#else
    Bfloat low[PANEL], high[PANEL];
    for (int lane = 0; lane < PANEL; lane += LANES) {
        store(low + lane, load(left + lane));
        store(high + lane, load(right + lane));
    }
    return paired(low, high);
#endif
}

// Add what each of the pairs makes with `factor`.
inline void add_products(Wide& sums, const Pairs& pairs, uint32_t factor) {
#if defined(PAIRS_IN_HARDWARE)
    sums = (Wide)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(factor));
#else
    const Pairs low = pairs << 16, high = pairs & 0xffff0000u;
    const uint32_t low_factor = factor << 16, high_factor = factor & 0xffff0000u;
    Wide lows, highs;
    float left, right;
    std::memcpy(&lows, &low, sizeof lows);
    std::memcpy(&highs, &high, sizeof highs);
    std::memcpy(&left, &low_factor, sizeof left);
    std::memcpy(&right, &high_factor, sizeof right);
    sums += lows * left + highs * right;
#endif
}

// c = a b, or with ADD += that, of c (COUNT, PANELS * PANEL), a (COUNT, depth, 2) and b (depth, PANELS * PANEL, 2).  The
// strides of each are in numbers; those of the last two dimensions of b are 2 and 1.  `ahead`: b is asked for so many
// numbers before it is read, if any.
template <int COUNT, int PANELS, bool ADD>
inline void product(const Bfloat* a, int64_t a_line, int64_t a_step, const Bfloat* b, int64_t b_step, int64_t b_panel,
                    float* c, int64_t c_line, int64_t c_panel, int64_t depth, int64_t ahead = 0) {
    Wide sums[COUNT][PANELS] = {};
    for (int line = 0; ADD && line < COUNT; line++)
        for (int panel = 0; panel < PANELS; panel++) sums[line][panel] = load_wide(c + line * c_line + panel * c_panel);
    for (int64_t place = 0; place < depth; place++) {
        Pairs pairs[PANELS];
        for (int panel = 0; panel < PANELS; panel++) {
            const Bfloat* from = b + place * b_step + panel * b_panel;
            if (ahead) __builtin_prefetch(from + ahead);
            pairs[panel] = load_pairs(from);
        }
        for (int line = 0; line < COUNT; line++) {
            const uint32_t factor = pair(a + line * a_line + place * a_step);
            for (int panel = 0; panel < PANELS; panel++) add_products(sums[line][panel], pairs[panel], factor);
        }
    }
    for (int line = 0; line < COUNT; line++)
        for (int panel = 0; panel < PANELS; panel++)
            std::memcpy(c + line * c_line + panel * c_panel, &sums[line][panel], sizeof(Wide));
}

}  // namespace
