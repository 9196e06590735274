// Checks, random numbers and naive references in double precision for the kernel tests.

#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gemm_packed.h"

#define CHECK(condition, ...)                                                 \
    do {                                                                      \
        if (!(condition)) {                                                   \
            std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                \
            std::fprintf(stderr, "\n");                                       \
            std::exit(1);                                                     \
        }                                                                     \
    } while (0)

// Numbers in [-1, 1) of so many bits with their sign: seven are held by int8 and every type of floats, exactly.
inline float random_float(int bits) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    const int half = 1 << (bits - 1);
    return (static_cast<int>(state >> (32 - bits)) - half) / static_cast<float>(half);
}

inline std::vector<float> random_floats(int64_t count, int bits = 7) {
    std::vector<float> numbers(count);
    for (float& each : numbers) each = random_float(bits);
    return numbers;
}

// Bits of random numbers that a type holds exactly.
template <class Number>
constexpr int random_bits = sizeof(Number) == 4 ? 24 : sizeof(Number) == 1 || std::is_same_v<Number, bfloat16> ? 7 : 11;

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) { return to_float(value); }

template <class Number>
Number narrow(float value) {
    if constexpr (std::is_same_v<Number, bfloat16>) {
        return to_bfloat16(value);
    } else if constexpr (std::is_same_v<Number, int8_t>) {
        return static_cast<int8_t>(value * 64);
#ifdef LLMK_HAVE_FLOAT16
    } else if constexpr (std::is_same_v<Number, float16>) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const uint32_t magnitude = value == 0.0f ? 0 : ((bits >> 13 & 0x3ffff) - (112 << 10));
        return {static_cast<uint16_t>((bits >> 16 & 0x8000) | magnitude)};
#endif
    } else {
        return value;
    }
}

template <class Number>
std::vector<Number> narrow_all(const std::vector<float>& values) {
    std::vector<Number> numbers;
    for (float value : values) numbers.push_back(narrow<Number>(value));
    return numbers;
}

// A linear layer with its weights as floats (outputs, inputs) and packed as gemm_packed.h draws them.
template <class Weight>
struct TestLinear {
    int64_t inputs, outputs;
    std::vector<float> dense, scale, offset;
    std::vector<Weight> packed;

    TestLinear(int64_t inputs, int64_t outputs, bool bias)
        : inputs(inputs), outputs(outputs), dense(random_floats(inputs * outputs, random_bits<Weight>)) {
        constexpr int64_t PAIR = std::is_same_v<Weight, bfloat16> ? 2 : 1;
        packed.resize((outputs + 31) / 32 * 32 * inputs);
        for (int64_t output = 0; output < outputs; output++)
            for (int64_t input = 0; input < inputs; input++)
                packed[output / 16 * 16 * inputs + input / PAIR * PAIR * 16 + output % 16 * PAIR + input % PAIR] =
                    narrow<Weight>(dense[output * inputs + input]);
        if (std::is_same_v<Weight, int8_t>)
            for (int64_t output = 0; output < outputs; output++) {
                // int8 holds 64 times the weight.
                scale.push_back((1.0f + output % 5) / 64);
                for (int64_t input = 0; input < inputs; input++) dense[output * inputs + input] *= 1.0f + output % 5;
            }
        if (bias) offset = random_floats(outputs);
    }

    PackedWeights<Weight> weights() const {
        return {packed.data(), scale.empty() ? nullptr : scale.data(), offset.empty() ? nullptr : offset.data()};
    }

    // The exact result for one token; `magnitude` is the sum of the absolute terms, which rounding errors grow with.
    double reference(const double* x, int64_t output, double* magnitude = nullptr) const {
        double sum = offset.empty() ? 0.0 : offset[output], absolute = std::abs(sum);
        for (int64_t input = 0; input < inputs; input++) {
            const double term = x[input] * dense[output * inputs + input];
            sum += term;
            absolute += std::abs(term);
        }
        if (magnitude) *magnitude = absolute;
        return sum;
    }

    std::vector<double> reference(const std::vector<double>& x) const {
        std::vector<double> out;
        for (int64_t output = 0; output < outputs; output++) out.push_back(reference(x.data(), output));
        return out;
    }
};

// Attention of one query over `count` keys and values, which are `stride` elements apart.
template <class Number>
std::vector<double> reference_attention(const double* q, const Number* keys, const Number* values, int64_t count,
                                        int64_t stride, int64_t size, double scale) {
    std::vector<double> scores(count), out(size);
    double peak = -INFINITY, total = 0;
    for (int64_t key = 0; key < count; key++) {
        for (int64_t at = 0; at < size; at++) scores[key] += scale * q[at] * double(widen(keys[key * stride + at]));
        peak = std::max(peak, scores[key]);
    }
    for (double& score : scores) total += score = std::exp(score - peak);
    for (int64_t key = 0; key < count; key++)
        for (int64_t at = 0; at < size; at++) out[at] += scores[key] / total * double(widen(values[key * stride + at]));
    return out;
}

inline float widen(double value) { return static_cast<float>(value); }

// |found - expected| / |expected|; NaN where anything is.
template <class Number>
double relative_error(const Number* found, const std::vector<double>& expected) {
    double difference = 0, norm = 0;
    for (size_t at = 0; at < expected.size(); at++) {
        difference += std::pow(double(widen(found[at])) - expected[at], 2);
        norm += std::pow(expected[at], 2);
    }
    return std::sqrt(difference / norm);
}
