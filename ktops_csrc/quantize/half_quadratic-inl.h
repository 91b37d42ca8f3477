#pragma once

// Half-quadratic quantization: ktops/formats/half_quadratic.py.

#include <cstdint>

#include "isa/vec-inl.h"
#include "quantize/groups-inl.h"

namespace kt::KT_ISA {

// x^power for normal x > 0.
inline VecF power_of(VecF x, float power) {
    constexpr double kLn2 = 0.69314718055994530942;
    constexpr float kArtanh[] = {static_cast<float>(2 / kLn2 / 1), static_cast<float>(2 / kLn2 / 3),
                                 static_cast<float>(2 / kLn2 / 5)};
    constexpr double kLn4 = kLn2 * kLn2, kLn8 = kLn4 * kLn2;
    constexpr float kExp2[] = {1,
                               static_cast<float>(kLn2),
                               static_cast<float>(kLn4 / 2),
                               static_cast<float>(kLn8 / 6),
                               static_cast<float>(kLn4 * kLn4 / 24),
                               static_cast<float>(kLn4 * kLn8 / 120),
                               static_cast<float>(kLn8 * kLn8 / 720)};
    const VecI32 bits = bit_cast<VecI32>(x), exponent = (bits - 0x3f3504f3) >> 23;
    const VecF mantissa = bit_cast<VecF>(bits - (exponent << 23));
    const VecF ratio = (mantissa - 1.0f) / (mantissa + 1.0f), square = ratio * ratio;
    const VecF series = rounded(square * (kArtanh[1] + rounded(square * kArtanh[2]))) + kArtanh[0];
    const VecF y = rounded((to_floats(exponent) + rounded(ratio * series)) * power);
    const VecF shifted = y + kRound, rest = y - (shifted - kRound);
    VecF result = broadcast(kExp2[6]);
    for (int i = 5; i >= 0; --i) result = rounded(result * rest) + kExp2[i];
    return bit_cast<VecF>(bit_cast<VecI32>(result) + ((bit_cast<VecI32>(shifted) - kRoundBits) << 23));
}

// The zero point with the least sum of |error|^0.7.
inline VecF half_quadratic_zero(const Lanes& lanes, VecF scale, VecF zero) {
    constexpr int kSteps = 20;
    constexpr float kPower = static_cast<float>(0.7 - 1), kSmallestSize = 1e-8f;
    double beta = 10;
    VecF best = zero, least = broadcast(__builtin_inff());
    const VecF divisor = divisor_of(scale), n = broadcast(static_cast<float>(lanes.n));
    for (int step = 0; step < kSteps; ++step, beta *= 1.01) {
        const VecF product = rounded(scale * zero), weight = broadcast(static_cast<float>(beta));
        VecF sums[2];
        ordered_sums(lanes.n, sums, [&](int64_t k, VecF* sum) {
            const VecF x = lanes[k], q = nearest_within((x + product) / divisor, 0, 15);
            const VecF error = x - rounded((q - zero) * scale);
            const VecF size = bit_cast<VecF>(magnitude(error));
            const VecF slope = power_of(size < kSmallestSize ? broadcast(kSmallestSize) : size, kPower);
            sum[0] += rounded(size * slope);
            const VecF less = size - slope / weight, left = less > 0.0f ? less : VecF{};
            const VecF shrunken = error < 0.0f ? -left : left;
            sum[1] += q - (x - shrunken) / scale;
        });
        best = sums[0] < least ? zero : best;
        least = sums[0] < least ? sums[0] : least;
        zero = scale == 0.0f ? zero : sums[1] / n;
    }
    return best;
}

}  // namespace kt::KT_ISA
