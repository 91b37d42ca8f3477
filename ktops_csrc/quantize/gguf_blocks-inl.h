#pragma once

// Quantizers of q4_0, q4_1, q5_0, q5_1 and q8_0, blocks of 32 weights, as the gguf package defines them.

#include <cstdint>
#include <cstring>

#include "core/workspace.h"
#include "isa/vec-inl.h"
#include "quantize/groups-inl.h"
#include "quantize/k_quant_blocks-inl.h"
#include "quantize/problem.h"

namespace kt::KT_ISA {

// Loads 32 weights, and returns the largest |x|, NaN if a weight is not finite.
inline float load_block(const float* x, VecF* v) {
    VecI32 most{};
    for (int i = 0; i < kChunkVectors; ++i) {
        v[i] = load(x + i * kLanes<float>);
        most = Larger()(most, magnitude(v[i]));
    }
    return finite_or_nan(largest_lane(most));
}

inline float inverse_or_zero(float d) { return d == 0 ? 0 : 1 / d; }

// q4_0, q4_1, q5_0, q5_1: unsigned codes. The code of 0 is the middle one or, with a minimum, that of the smallest
// weight is 0.
template <int kBits, bool kMinimum>
struct UnsignedBlock {
    static constexpr int kHigh = (1 << kBits) - 1, kMiddle = 1 << (kBits - 1);
    static constexpr int64_t kHalves = kMinimum ? 4 : 2, kUpper = kBits == 5 ? 4 : 0, kBytes = kHalves + kUpper + 16;

    static void write(const float* x, uint8_t* out) {
        VecF v[kChunkVectors];
        const float largest = load_block(x, v);
        float d, low = 0;
        if constexpr (kMinimum) {
            const Range range = extremes(v);
            low = range.low;
            d = (range.high - low) / static_cast<float>(kHigh);
        } else {
            d = first_of_size(x, largest) / static_cast<float>(-kMiddle);
        }
        if (largest != largest) d = largest;
        const float inverse = inverse_or_zero(d), half = kMinimum ? 0.5f : kMiddle + 0.5f;
        uint8_t codes[32];
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecF code = rounded((v[i] - low) * inverse) + half;
            const auto whole = __builtin_convertvector(clamp(code, 0, kHigh), VecI32);
            store_bytes(whole, reinterpret_cast<int8_t*>(codes + i * kLanes<float>));
        }
        put_half(from_float<float16>(d), out);
        if constexpr (kMinimum) put_half(from_float<float16>(low + 0.0f), out + 2);
        if constexpr (kBits == 5) {
            uint32_t upper = 0;
            for (int i = 0; i < 32; ++i) upper |= static_cast<uint32_t>(codes[i] >> 4) << i;
            std::memcpy(out + kHalves, &upper, sizeof(upper));
        }
        pack_parts<4>(16, 16, [&](int64_t i) { return codes[i] & 15; }, out + kHalves + kUpper);
    }

private:
    static Range extremes(const VecF* v) {
        VecF low = v[0], high = v[0];
        for (int i = 1; i < kChunkVectors; ++i) {
            low = v[i] < low ? v[i] : low;
            high = v[i] > high ? v[i] : high;
        }
        return of_lanes(low, high);
    }

    // The first weight of this size.
    static float first_of_size(const float* x, float size) {
        for (int i = 0; i < 32; ++i) {
            if (x[i] == size || x[i] == -size) return x[i];
        }
        return size;
    }
};

// q8_0: signed codes, rounded to nearest with halves away from 0.
struct SignedBlock {
    static constexpr int64_t kBytes = 34;

    static void write(const float* x, uint8_t* out) {
        VecF v[kChunkVectors];
        const float d = load_block(x, v) / 127, inverse = inverse_or_zero(d);
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecF code = clamp(rounded(v[i] * inverse), -127, 127);
            const VecI32 sign = code < 0.0f;
            const VecF size = bit_cast<VecF>(magnitude(code));
            const VecI32 below = __builtin_convertvector(size, VecI32);
            const VecI32 whole = below - (size - to_floats(below) >= 0.5f);
            store_bytes((whole ^ sign) - sign, reinterpret_cast<int8_t*>(out + 2 + i * kLanes<float>));
        }
        put_half(from_float<float16>(d), out);
    }
};

template <class Block>
class GgufRows {
public:
    static constexpr int64_t kRows = 16;

    GgufRows(const QuantizeProblem& p, Workspace& workspace)
        : p_(p), row_(workspace.take<float>(p.num_threads * p.columns)) {}

    void operator()(int64_t e, int64_t row, int64_t n, int thread) const {
        float* x = row_ + thread * p_.columns;
        for (int64_t i = 0; i < n; ++i) {
            load_row(p_, e, row + i, p_.columns, x);
            uint8_t* out = p_.codes + (e * p_.rows + row + i) * p_.row_bytes;
            for (int64_t k = 0; k < p_.columns; k += 32, out += Block::kBytes) Block::write(x + k, out);
        }
    }

private:
    const QuantizeProblem& p_;
    float* const row_;
};

}  // namespace kt::KT_ISA
