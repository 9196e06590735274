// The arithmetic that all kernels share: the exponential, and bfloat16 with its pairs.

#include <limits>

#include "reference.h"

namespace {

void check_exponential() {
    for (double x = 0; x > -86; x -= 0.000917) {
        const float input = static_cast<float>(x), found = exp_nonpositive(broadcast(input))[3];
        const double expected = std::exp(double(input));
        CHECK(std::abs(found - expected) <= 2e-7 * expected, "e^%g is %g instead of %g", input, found, expected);
    }
    for (float x : {-87.0f, -1e4f, -1e30f, -std::numeric_limits<float>::max(), -INFINITY})
        CHECK(0.0f == exp_nonpositive(broadcast(x))[0], "e^%g is not 0", x);
    CHECK(1.0f == exp_nonpositive(f32x8{})[0], "e^0 is not 1");
    CHECK(std::isnan(exp_nonpositive(broadcast(NAN))[0]), "e^NaN is a number");
}

void check_rounding() {
    // Halfway between two bfloat16 numbers: to the even one.
    const float inputs[LANES] = {1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 3.3895314e38f, INFINITY, 0.0f, 1.005f};
    const float expected[LANES] = {1.0f, 1.0f, 1.015625f, -1.0f, 3.3895314e38f, INFINITY, 0.0f, 1.0078125f};
    bfloat16 stored[LANES];
    store(stored, load(inputs));
    for (int lane = 0; lane < LANES; lane++) {
        CHECK(expected[lane] == to_float(stored[lane]), "%.9g is stored as %.9g", inputs[lane], to_float(stored[lane]));
        CHECK(expected[lane] == to_float(to_bfloat16(inputs[lane])), "%.9g is rounded differently", inputs[lane]);
        CHECK(expected[lane] == load(stored)[lane], "%.9g is loaded as %.9g", inputs[lane], load(stored)[lane]);
    }
    store(stored, broadcast(NAN));
    CHECK(std::isnan(to_float(stored[0])) && std::isnan(to_float(to_bfloat16(NAN))), "NaN becomes a number");
}

void check_pairs() {
    const std::vector<float> left = random_floats(NR), right = random_floats(NR);
    const std::vector<bfloat16> narrow_left = narrow_all<bfloat16>(left), narrow_right = narrow_all<bfloat16>(right);
    const bfloat16 factor[2] = {to_bfloat16(0.5f), to_bfloat16(-3.0f)};
    f32x16 from_floats = 1.0f - f32x16{}, from_bfloat16 = from_floats;
    accumulate_dot(from_floats, interleave(left.data(), right.data()), load_pair(factor));
    accumulate_dot(from_bfloat16, interleave(narrow_left.data(), narrow_right.data()), load_pair(factor));
    for (int lane = 0; lane < NR; lane++) {
        const float expected = 1.0f + 0.5f * left[lane] - 3.0f * right[lane];
        CHECK(expected == from_floats[lane], "lane %d is %g instead of %g", lane, from_floats[lane], expected);
        CHECK(expected == from_bfloat16[lane], "lane %d is %g instead of %g", lane, from_bfloat16[lane], expected);
    }
}

}  // namespace

int main() {
    check_exponential();
    check_rounding();
    check_pairs();
}
