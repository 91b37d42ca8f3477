#pragma once

// Quantizers of fp8_e4m3, mxfp8 and mxfp4: ktops/formats/floating.py.

#include <cstdint>
#include <cstring>

#include "core/workspace.h"
#include "isa/vec-inl.h"
#include "quantize/groups-inl.h"
#include "quantize/integer-inl.h"
#include "quantize/problem.h"

namespace kt::KT_ISA {

constexpr float kFp8Max = 448;

// E4M3 codes of |x| <= 448, to nearest even. Adding 2^14 to a subnormal |x| < 2^-6 leaves the nearest multiple of 2^-9
// in the lowest bits.
inline VecI32 fp8_codes(VecF x) {
    constexpr int32_t kBias = (127 - 7) << 23, kSmallestNormal = (127 - 6) << 23, kSubnormalBits = (127 + 14) << 23;
    const VecI32 bits = bit_cast<VecI32>(x), size = bits & 0x7fffffff;
    const VecI32 normal = (size - kBias + 0x7ffff + (size >> 20 & 1)) >> 20;
    const VecI32 subnormal = bit_cast<VecI32>(bit_cast<VecF>(size) + 16384.0f) - kSubnormalBits;
    const VecI32 sign = bit_cast<VecI32>(bit_cast<VecU32>(bits) >> 24 & 0x80);
    return (size < kSmallestNormal ? subnormal : normal) | sign;
}

// E2M1 codes; a number halfway between two goes to the smaller.
inline VecI32 fp4_codes(VecF x) {
    const VecF size = bit_cast<VecF>(magnitude(x));
    VecI32 code{};
    for (float middle : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f}) code -= size > middle;
    return code | ((x < 0.0f) & 8);
}

// fp8_e4m3: a float32 scale per row or per block of 128 x 128.
class Fp8Rows {
public:
    static constexpr int64_t kRows = 128;

    Fp8Rows(const QuantizeProblem& p, Workspace& workspace)
        : p_(p),
          groups_(p.groups()),
          room_(round_up(p.columns, p.group % kChunk ? kChunk : p.group)),
          row_(workspace.take<float>(p.num_threads * room_)),
          largest_(workspace.take<int32_t>(p.num_threads * groups_)) {}

    void operator()(int64_t e, int64_t row, int64_t n, int thread) const {
        const int64_t together = p_.row_scale ? 1 : n;
        for (int64_t i = 0; i < n; i += together) block(e, row + i, together, thread);
    }

private:
    // Rows that share their scales.
    void block(int64_t e, int64_t row, int64_t n, int thread) const {
        float* x = row_ + thread * room_;
        int32_t* largest = largest_ + thread * groups_;
        std::memset(largest, 0, static_cast<size_t>(groups_) * sizeof(int32_t));
        for (int64_t i = 0; i < n; ++i) {
            if (n > 1 || i == 0) load_row(p_, e, row + i, room_, x);
            for (int64_t g = 0; g < groups_; ++g) {
                const int64_t column = g * p_.group, count = smaller(p_.group, p_.columns - column);
                const auto of_row = bit_cast<int32_t>(largest_magnitude(x + column, count));
                largest[g] = of_row > largest[g] ? of_row : largest[g];
            }
        }
        const int64_t blocks = ceil_div(p_.rows, p_.row_scale ? 1 : kRows);
        float* scale = static_cast<float*>(p_.scale) + (e * blocks + row / (p_.row_scale ? 1 : kRows)) * groups_;
        for (int64_t g = 0; g < groups_; ++g) scale[g] = bit_cast<float>(largest[g]) / kFp8Max;
        for (int64_t i = 0; i < n; ++i) {
            if (n > 1) load_row(p_, e, row + i, room_, x);
            store(e * p_.rows + row + i, x, scale);
        }
    }

    void store(int64_t row, const float* x, const float* scale) const {
        for (int64_t g = 0; g < groups_; ++g) {
            const int64_t column = g * p_.group, count = smaller(p_.group, p_.columns - column);
            const VecF divisor = broadcast(scale[g]);
            const bool zeros = scale[g] == 0;
            store_code_bytes(x + column, count, p_.codes + row * p_.row_bytes + column, [&](VecF v) {
                return zeros ? VecI32{} : fp8_codes(clamp(v / divisor, -kFp8Max, kFp8Max));
            });
        }
    }

    const QuantizeProblem& p_;
    const int64_t groups_, room_;
    float* const row_;
    int32_t* const largest_;
};

// mxfp8 and mxfp4: groups of 32 columns and a power of two.
template <bool kFp4>
class MicroscalingRows {
public:
    static constexpr int64_t kRows = 16;

    MicroscalingRows(const QuantizeProblem& p, Workspace& workspace)
        : p_(p), row_(workspace.take<float>(p.num_threads * p.columns)) {}

    void operator()(int64_t e, int64_t row, int64_t n, int thread) const {
        float* x = row_ + thread * p_.columns;
        for (int64_t i = 0; i < n; ++i) {
            load_row(p_, e, row + i, p_.columns, x);
            store(e * p_.rows + row + i, x);
        }
    }

private:
    static constexpr int kMaxExponent = kFp4 ? 2 : 8;

    void store(int64_t row, const float* x) const {
        const int64_t groups = p_.groups();
        uint8_t* scales = static_cast<uint8_t*>(p_.scale) + row * groups;
        uint8_t* codes = p_.codes + row * p_.row_bytes;
        for (int64_t g = 0; g < groups; ++g) {
            scales[g] = scale_of(largest_magnitude(x + g * kChunk, kChunk));
            const float inverse = power_of_two(254 - scales[g]);
            if constexpr (kFp4) {
                store_code_nibbles(x + g * kChunk, kChunk, codes + g * kChunk / 2,
                                   [&](VecF v) { return fp4_codes(v * inverse); });
            } else {
                store_code_bytes(x + g * kChunk, kChunk, codes + g * kChunk,
                                 [&](VecF v) { return fp8_codes(clamp(v * inverse, -kFp8Max, kFp8Max)); });
            }
        }
    }

    // 127 + floor(log2(largest)) - kMaxExponent, at least 0; 255 for NaN.
    static uint8_t scale_of(float largest) {
        if (largest != largest) return 255;
        int32_t exponent = bit_cast<int32_t>(largest) >> 23;
        if (exponent <= kMaxExponent) return 0;
        return static_cast<uint8_t>(exponent - kMaxExponent);
    }

    // 2^(biased - 127), 0 <= biased < 255.
    static float power_of_two(int biased) { return bit_cast<float>(biased > 0 ? biased << 23 : 1 << 22); }

    const QuantizeProblem& p_;
    float* const row_;
};

}  // namespace kt::KT_ISA
