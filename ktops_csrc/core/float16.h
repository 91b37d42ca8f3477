#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

// An IEEE binary16 as float32, exactly.
inline float float16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
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

}  // namespace kt
