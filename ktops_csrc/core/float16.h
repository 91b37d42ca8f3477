#pragma once

#include <cstdint>
#include <cstring>

#include "core/bfloat16.h"

namespace kt {

// IEEE binary16.
struct float16 {
    uint16_t bits;
};

inline float to_float(float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    uint32_t out;
    if (magnitude >= 0x7c00) {  // infinity, NaN
        out = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
        if (magnitude > 0x7c00) out |= 0x400000;
    } else if (magnitude >= 0x400) {
        out = sign | ((magnitude << 13) + ((127 - 15) << 23));
    } else {  // subnormal: magnitude * 2^-24
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        std::memcpy(&out, &value, sizeof(out));
        out |= sign;
    }
    float value;
    std::memcpy(&value, &out, sizeof(value));
    return value;
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
template <>
inline float16 from_float<float16, float>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) {  // NaN
        out = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
        out = 0x7c00;
    } else if (magnitude >= (127 - 14) << 23) {
        out = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {  // subnormal: adding 0.5 leaves the nearest multiple of 2^-24 in the lowest bits
        float value;
        std::memcpy(&value, &magnitude, sizeof(value));
        value += 0.5f;
        std::memcpy(&out, &value, sizeof(out));
        out -= 0x3f000000;
    }
    return {static_cast<uint16_t>(sign | out)};
}
template <>
inline float16 from_float<float16, double>(double x) {
    return from_float<float16>(static_cast<float>(x));
}

}  // namespace kt
