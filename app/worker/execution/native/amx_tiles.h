// Products in tiles (AMX): sixteen tokens by sixteen outputs of a whole panel in one instruction.
//
// The packed layout is that of gemm_packed.h: sixteen lines of a panel of pairs, 64 bytes each, are one tile of
// weights, and sixteen tokens by 32 inputs one of activations.  So panels and tiles share the weights, and a model can
// be computed by either.
//
// A tile sums 32 inputs before it adds them to the accumulator, so that its bits are not those of panels.  Among
// themselves tiles are batch-invariant: rows do not see each other, and any number of tokens goes through the same
// instructions.

#pragma once

#include <algorithm>
#include <cmath>

#include "bf16.h"
#include "simd.h"

// Where the processor and the compiler know the instructions (older versions of Clang spell the macros in another way);
// tests define LLMK_EMULATE_TILES to have tiles anywhere.
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__)) || (defined(__AMXTILE__) && defined(__AMXBF16__))
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LLMK_HAVE_AMX 1
#endif

namespace {

// Rows of a tile, and inputs of one tile of activations or weights.
constexpr int64_t TILE_ROWS = 16, TILE_INPUTS = 32;
// Tokens of one call: two tiles, which share the loads of two tiles of weights.
constexpr int64_t TILE_TOKENS = 2 * TILE_ROWS;
static_assert(TILE_ROWS == NR, "a tile of weights is as wide as a panel");

// What the instruction computes, as Intel's manual describes it, but for denormal numbers.
class EmulatedTiles {
  public:
    static bool permitted() { return true; }
    static void release() {}

    // Begins with sums (tokens, 2 * NR), or with zeros.
    explicit EmulatedTiles(int64_t tokens, const float* sums = nullptr) : tokens_(tokens) {
        if (sums != nullptr) std::memcpy(sums_, sums, tokens * sizeof sums_[0]);
    }

    // Take TILE_INPUTS inputs of two panels, whose lines are `line` apart.
    void load_weights(const bfloat16* left, const bfloat16* right, int64_t line) {
        for (int64_t pair = 0; pair < TILE_ROWS; pair++) {
            std::copy_n(left + pair * line, 2 * NR, weights_[pair]);
            std::copy_n(right + pair * line, 2 * NR, weights_[pair] + 2 * NR);
        }
    }

    // Accumulate as many inputs of x (tokens, stride) with them.
    void multiply(const bfloat16* x, int64_t stride) {
        for (int64_t token = 0; token < tokens_; token++)
            for (int64_t output = 0; output < 2 * NR; output++)
                accumulate(x + token * stride, 2 * output, sums_[token][output]);
    }

    // sums: (tokens, 2 * NR)
    void store(float* sums) const { std::memcpy(sums, sums_, tokens_ * sizeof sums_[0]); }

  private:
    void accumulate(const bfloat16* x, int64_t column, float& sum) const {
        float even = 0.0f, odd = 0.0f;
        for (int64_t pair = 0; pair < TILE_ROWS; pair++) {
            even = std::fma(to_float(x[2 * pair]), to_float(weights_[pair][column]), even);
            odd = std::fma(to_float(x[2 * pair + 1]), to_float(weights_[pair][column + 1]), odd);
        }
        sum += even + odd;
    }

    int64_t tokens_;
    bfloat16 weights_[TILE_ROWS][4 * NR] = {};
    float sums_[TILE_TOKENS][2 * NR] = {};
};

#if defined(LLMK_HAVE_AMX)
// The tile registers of this thread: 0 to 3 are the sums of two tiles of tokens by two panels, 4 and 5 activations, 6
// and 7 weights.  GCC does not know that loads of tiles read memory: an empty `asm` before them makes sure that what was
// written is there.
class AmxTiles {
  public:
    // Linux has a process ask before it uses them; true where it may.
    static bool permitted() {
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        return 0 == syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    }

    // Give up the registers, which every switch to another thread would save.
    static void release() {
        if (configured_ != 0) _tile_release();
        configured_ = 0;
    }

    explicit AmxTiles(int64_t tokens, const float* sums = nullptr) : second_(tokens > TILE_ROWS) {
        if (tokens != configured_) configure(tokens);
        if (sums != nullptr)
            load(sums);
        else
            clear();
    }

    void load_weights(const bfloat16* left, const bfloat16* right, int64_t line) {
        asm volatile("" ::"r"(left), "r"(right) : "memory");
        _tile_loadd(6, left, line * sizeof(bfloat16));
        _tile_loadd(7, right, line * sizeof(bfloat16));
    }

    void multiply(const bfloat16* x, int64_t stride) {
        asm volatile("" ::"r"(x) : "memory");
        _tile_loadd(4, x, stride * sizeof(bfloat16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second_) {
            _tile_loadd(5, x + TILE_ROWS * stride, stride * sizeof(bfloat16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

    void store(float* sums) const {
        _tile_stored(0, sums, ROW);
        _tile_stored(1, sums + NR, ROW);
        if (second_) {
            _tile_stored(2, sums + TILE_ROWS * 2 * NR, ROW);
            _tile_stored(3, sums + TILE_ROWS * 2 * NR + NR, ROW);
        }
    }

  private:
    // Bytes of a row of sums.
    static constexpr int64_t ROW = 2 * NR * sizeof(float);

    void clear() {
        _tile_zero(0);
        _tile_zero(1);
        if (second_) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }

    void load(const float* sums) {
        asm volatile("" ::"r"(sums) : "memory");
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + NR, ROW);
        if (second_) {
            _tile_loadd(2, sums + TILE_ROWS * 2 * NR, ROW);
            _tile_loadd(3, sums + TILE_ROWS * 2 * NR + NR, ROW);
        }
    }

    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };

    // Tiles have as many rows as there are tokens, so that none beyond the last is read.
    static void configure(int64_t tokens) {
        const uint8_t first = std::min(tokens, TILE_ROWS), second = tokens - first;
        const uint8_t rows[8] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
        Configuration configuration;
        for (int tile = 0; tile < 8; tile++) {
            configuration.rows[tile] = rows[tile];
            configuration.row_bytes[tile] = rows[tile] ? 64 : 0;
        }
        asm volatile("" ::"r"(&configuration) : "memory");
        _tile_loadconfig(&configuration);
        configured_ = tokens;
    }

    static inline thread_local int64_t configured_ = 0;
    bool second_;
};
#endif

#if defined(LLMK_EMULATE_TILES)
#define LLMK_HAVE_TILES 1
typedef EmulatedTiles Tiles;
#elif defined(LLMK_HAVE_AMX)
#define LLMK_HAVE_TILES 1
typedef AmxTiles Tiles;
#endif

// Inputs and weights in pairs, as tiles read them: strides of tokens, of panels and of a panel's lines, in elements.
struct TileOperands {
    const bfloat16* x;
    int64_t x_stride;
    const bfloat16* panels;
    int64_t panel_stride, line_stride;
};

// sums (tokens, 2 * NR) of two panels for up to TILE_TOKENS tokens; the depth is even; `ahead` is prefetched, unless it
// is null.
template <class AnyTiles>
void multiply_tiles(const TileOperands& operands, int64_t depth, int64_t tokens, float* sums,
                    Ahead<bfloat16> ahead = {}) {
    AnyTiles tiles(tokens);
    const auto [x, x_stride, panels, panel_stride, line_stride] = operands;
    const bfloat16 *left = panels, *right = panels + panel_stride;
    int64_t k = 0;
    for (; k + TILE_INPUTS <= depth; k += TILE_INPUTS) {
        for (int64_t at = k * NR; ahead.panel[0] != nullptr && at < (k + TILE_INPUTS) * NR; at += 2 * NR)
            for (const bfloat16* panel : ahead.panel) __builtin_prefetch(panel + at);
        const int64_t line = k / 2 * line_stride;
        tiles.load_weights(left + line, right + line, line_stride);
        tiles.multiply(x + k, x_stride);
    }
    if (const int64_t rest = depth - k; rest > 0) {
        // Filled up with zeros.
        alignas(64) bfloat16 inputs[TILE_TOKENS * TILE_INPUTS] = {}, weights[2][TILE_INPUTS * NR] = {};
        for (int64_t token = 0; token < tokens; token++)
            std::copy_n(x + token * x_stride + k, rest, inputs + token * TILE_INPUTS);
        for (int64_t pair = 0; pair < rest / 2; pair++) {
            const int64_t line = (k / 2 + pair) * line_stride;
            std::copy_n(left + line, 2 * NR, weights[0] + pair * 2 * NR);
            std::copy_n(right + line, 2 * NR, weights[1] + pair * 2 * NR);
        }
        tiles.load_weights(weights[0], weights[1], 2 * NR);
        tiles.multiply(inputs, TILE_INPUTS);
    }
    tiles.store(sums);
}

// The same for panels of packed weights (gemm_packed.h).
template <class AnyTiles>
void multiply_packed_tiles(const bfloat16* x, const bfloat16* panels, int64_t panel_stride, int64_t depth,
                           int64_t tokens, float* sums, Ahead<bfloat16> ahead) {
    multiply_tiles<AnyTiles>({x, depth, panels, panel_stride, 2 * NR}, depth, tokens, sums, ahead);
}

}  // namespace
