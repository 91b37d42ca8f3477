#pragma once

#include <cmath>

#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// e^x to about one unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial
// (degree 7: 0.347^8 / 8! = 5e-9), ln 2 split in two so that n ln 2 is exact (Cody and Waite, 1980).
inline Vec<float> exp(Vec<float> x) {
    const Vec<float> lowest = broadcast(-87.0f), highest = broadcast(88.0f);
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Vec<float> shifted = x * 1.44269504088896341f + kRound;
    const Vec<float> n = shifted - kRound;
    Vec<float> r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const VecI32 exponent = (bit_cast<VecI32>(shifted) - kRoundBits + 127) << 23;
    return p * bit_cast<Vec<float>>(exponent);
}

inline Vec<double> exp(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26). exp_minus_x2: e^(-x^2), which callers already have.
inline Vec<float> erf(Vec<float> x, Vec<float> exp_minus_x2) {
    const Vec<float> zero{};
    const Vec<float> a = x < zero ? -x : x;
    const Vec<float> t = 1.0f / (1.0f + 0.3275911f * a);
    Vec<float> p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vec<float> y = 1.0f - p * t * exp_minus_x2;
    return x < zero ? -y : y;
}

inline Vec<double> erf(Vec<double> x, Vec<double>) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
    return x;
}

// tanh to two units in the last place (Cephes): x + x^3 P(x^2) / Q(x^2) for |x| < 0.625, else 1 - 2 / (e^2|x| + 1).
inline Vec<float> tanh(Vec<float> x) {
    const Vec<float> zero{}, limit = broadcast(0.625f), a = x < zero ? -x : x, z = x * x;
    Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const Vec<float> large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
    return a < limit ? x + x * z * p : x < zero ? -large : large;
}

inline Vec<double> tanh(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
    return x;
}

}  // namespace kt::KT_ISA
