#pragma once

// isa/simd-inl.h in plain C++, for vectors of 16 bytes.

#include <cstdint>
#include <cstring>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "isa/simd-inl.h"
#include "isa/simd_portable-inl.h"

namespace kt::KT_ISA {

inline void transpose_16x16(const char* rows, int64_t stride, uint32_t* out) {
    for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 16; ++k) std::memcpy(out + 16 * k + n, rows + n * stride + 4 * k, 4);
    }
}

inline VecI32 widen_unsigned(const uint8_t* p) { return VecI32{p[0], p[1], p[2], p[3]}; }
inline VecI32 widen_signed(const uint8_t* p) {
    const auto* s = reinterpret_cast<const int8_t*>(p);
    return VecI32{s[0], s[1], s[2], s[3]};
}

inline VecF load_partial(const float* p, int64_t n) { return load_lanes(p, n); }

inline float float16_at(const void* p) { return to_float(read(static_cast<const float16*>(p))); }
inline VecF from_float16(VecU16 x) {
    constexpr int32_t kBias = (127 - 15) << 23;
    const VecU32 bits = widen(x);
    const VecI32 magnitude = (VecI32)(bits & 0x7fff);
    const VecI32 special = (magnitude >= 0x7c00) & kBias, quiet = (magnitude > 0x7c00) & 0x400000;
    const VecI32 normal = ((magnitude << 13) + kBias + special) | quiet;
    const VecF subnormal = to_floats(magnitude) * 5.9604644775390625e-8f;
    return (VecF)((VecU32)(magnitude < 0x400 ? (VecI32)subnormal : normal) | (bits & 0x8000) << 16);
}
inline VecU16 to_float16(VecF x) {
    VecU16 out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = from_float<float16>(x[i]).bits;
    return out;
}

inline void unpack_fp8(const uint8_t* p, VecF* v) {
    float values[kChunk];
    for (int i = 0; i < kChunk; ++i) {
        const uint16_t nan = (p[i] & 0x7f) == 0x7f ? 0x7e00 : 0;
        values[i] = to_float(float16{static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7 | nan)});
    }
    for (int i = 0; i < kChunkVectors; ++i) v[i] = load_bits<VecF>(values + i * kLanes<float>);
}

inline VecF lookup(const float* table, VecI32 index) {
    VecF out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = table[index[i] & 15];
    return out;
}
inline VecCodes lookup_codes(const uint8_t* table, VecCodes index) {
    VecCodes out;
    for (int i = 0; i < kCodeBytes; ++i) out[i] = table[index[i]];
    return out;
}

inline VecDots multiply_words(VecWords a, VecWords b) {
    const auto x = (VecDots)a, y = (VecDots)b;
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
}
inline VecWords multiply_bytes(VecCodes a, VecCodes b) {
    const auto x = (VecWords)a, y = (VecWords)b;
    return (x & 255) * ((y << 8) >> 8) + ((x >> 8) & 255) * (y >> 8);
}

}  // namespace kt::KT_ISA
