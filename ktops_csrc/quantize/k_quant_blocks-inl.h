#pragma once

// The k-quants: their parameters, and how codes and scales are packed into the blocks of ggml.

#include <cstdint>
#include <cstring>

#include "core/float16.h"
#include "isa/traits.h"

namespace kt::KT_ISA {

// A block of 256 weights: codes from 0, and per group the integers of its scale and its minimum.
struct KQuantBlock {
    uint8_t codes[256];
    int8_t scale[16];
    uint8_t minimum[16];
    float16 d, dmin;
};

// Packs `count` bytes from numbers of `bits` bits: the parts of a byte, lowest first, are `apart` numbers apart.
template <int kBits, class Number>
inline void pack_parts(int64_t count, int64_t apart, Number number, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        int byte = 0;
        for (int part = 0; part < 8 / kBits; ++part) byte |= number(part * apart + i) << part * kBits;
        out[i] = static_cast<uint8_t>(byte);
    }
}

inline void put_half(float16 x, uint8_t* out) { std::memcpy(out, &x.bits, sizeof(x.bits)); }

// 12 bytes: the first four scales and minima with the upper bits of the others, then the lower bits of the others.
inline void pack_six_bits(const KQuantBlock& b, uint8_t* out) {
    for (int g = 0; g < 4; ++g) {
        const auto scale = static_cast<uint8_t>(b.scale[g + 4]);
        out[g] = static_cast<uint8_t>(b.scale[g] | scale >> 4 << 6);
        out[g + 4] = static_cast<uint8_t>(b.minimum[g] | b.minimum[g + 4] >> 4 << 6);
        out[g + 8] = static_cast<uint8_t>((scale & 15) | (b.minimum[g + 4] & 15) << 4);
    }
}

// kGroup weights share a scale; codes are in [kLow, kHigh], scales and minima at most kMost; a search tries ranges down
// to the fraction kSmallest. kMinimum: groups have minima, and nothing is negative.
struct Q2K {
    static constexpr int kGroup = 16, kLow = 0, kHigh = 3, kMost = 15, kBytes = 84;
    static constexpr double kSmallest = 0.5;
    static constexpr bool kMinimum = true;

    static void pack(const KQuantBlock& b, uint8_t* out) {
        for (int g = 0; g < 16; ++g) out[g] = static_cast<uint8_t>(b.scale[g] | b.minimum[g] << 4);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* codes = b.codes + 128 * half;
            pack_parts<2>(32, 32, [&](int64_t i) { return codes[i]; }, out + 16 + 32 * half);
        }
        put_half(b.d, out + 80);
        put_half(b.dmin, out + 82);
    }
};

struct Q3K {
    static constexpr int kGroup = 16, kLow = -4, kHigh = 3, kMost = 31, kBytes = 110;
    static constexpr double kSmallest = 0.5;
    static constexpr bool kMinimum = false;

    static void pack(const KQuantBlock& b, uint8_t* out) {
        pack_parts<1>(32, 32, [&](int64_t i) { return b.codes[i] >> 2; }, out);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* codes = b.codes + 128 * half;
            pack_parts<2>(32, 32, [&](int64_t i) { return codes[i] & 3; }, out + 32 + 32 * half);
        }
        pack_parts<4>(8, 8, [&](int64_t g) { return (b.scale[g] + 32) & 15; }, out + 96);
        pack_parts<2>(4, 4, [&](int64_t g) { return (b.scale[g] + 32) >> 4; }, out + 104);
        put_half(b.d, out + 108);
    }
};

struct Q4K {
    static constexpr int kGroup = 32, kLow = 0, kHigh = 15, kMost = 63, kBytes = 144;
    static constexpr double kSmallest = 0.5;
    static constexpr bool kMinimum = true;

    static void pack(const KQuantBlock& b, uint8_t* out) {
        put_half(b.d, out);
        put_half(b.dmin, out + 2);
        pack_six_bits(b, out + 4);
        pack_lower(b, out + 16);
    }
    static void pack_lower(const KQuantBlock& b, uint8_t* out) {
        for (int part = 0; part < 4; ++part) {
            const uint8_t* codes = b.codes + 64 * part;
            pack_parts<4>(32, 32, [&](int64_t i) { return codes[i] & 15; }, out + 32 * part);
        }
    }
};

struct Q5K {
    static constexpr int kGroup = 32, kLow = 0, kHigh = 31, kMost = 63, kBytes = 176;
    static constexpr double kSmallest = 0.7;
    static constexpr bool kMinimum = true;

    static void pack(const KQuantBlock& b, uint8_t* out) {
        put_half(b.d, out);
        put_half(b.dmin, out + 2);
        pack_six_bits(b, out + 4);
        pack_parts<1>(32, 32, [&](int64_t i) { return b.codes[i] >> 4; }, out + 16);
        Q4K::pack_lower(b, out + 48);
    }
};

struct Q6K {
    static constexpr int kGroup = 16, kLow = -32, kHigh = 31, kMost = 127, kBytes = 210;
    static constexpr double kSmallest = 0.8;
    static constexpr bool kMinimum = false;

    static void pack(const KQuantBlock& b, uint8_t* out) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t* codes = b.codes + 128 * half;
            pack_parts<4>(64, 64, [&](int64_t i) { return codes[i] & 15; }, out + 64 * half);
            pack_parts<2>(32, 32, [&](int64_t i) { return codes[i] >> 4; }, out + 128 + 32 * half);
        }
        std::memcpy(out + 192, b.scale, 16);
        put_half(b.d, out + 208);
    }
};

}  // namespace kt::KT_ISA
