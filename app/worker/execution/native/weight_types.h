// The types that weights are stored in beside bfloat16, read as floats.

#pragma once

#include <type_traits>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "bf16.h"
#include "simd.h"

namespace {

inline f32x8 load(const int8_t* from) {
#if defined(__AVX2__)
    // GCC 12 compiles the portable way to one conversion for each element.
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t i8x8 __attribute__((vector_size(LANES)));
    i8x8 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, i32x8), f32x8);
#endif
}

#if defined(__F16C__) || defined(__aarch64__)
#define LLMK_HAVE_FLOAT16 1
// A storage type of weights; the arithmetic is float32.
struct float16 {
    uint16_t bits;
};

inline f32x8 load(const float16* from) {
#if defined(__F16C__)
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    typedef __fp16 f16x8 __attribute__((vector_size(LANES * sizeof(__fp16))));
    f16x8 halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, f32x8);
#endif
}
#endif

// Accumulators of the float32 microkernel, which fill all registers but those of the operands, and vectors of a panel.
#if defined(__AVX512F__)
typedef f32x16 accumulator_t;
constexpr int MAX_VECTORS = 24;
#else
typedef f32x8 accumulator_t;
constexpr int MAX_VECTORS = 12;
#endif
constexpr int PANEL_VECTORS = sizeof(f32x16) / sizeof(accumulator_t);

// One vector of weights as floats.
template <class Weight>
inline accumulator_t load_weights(const Weight* from) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Weight, float16>)
        return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    if constexpr (std::is_same_v<Weight, int8_t>)
        return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    if constexpr (std::is_same_v<Weight, float>) return load_f32x16(from);
#else
    return load(from);
#endif
}

// A line of a panel.
template <class Weight>
inline f32x16 load_line(const Weight* from) {
    accumulator_t vectors[PANEL_VECTORS];
    for (int at = 0; at < PANEL_VECTORS; at++) vectors[at] = load_weights(from + at * (NR / PANEL_VECTORS));
    f32x16 line;
    std::memcpy(&line, vectors, sizeof line);
    return line;
}

}  // namespace
