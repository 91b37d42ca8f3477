#pragma once

// The functions of isa/simd-inl.h that need no instructions of their own on an ISA with vectors of 16 or 32 bytes.

#include <cstdint>
#include <cstring>

#include "isa/simd-inl.h"

namespace kt::KT_ISA {

inline VecU8 load_partial(const uint8_t* p, int64_t n) { return load_bits_partial<VecU8>(p, n); }
inline VecU16 load_partial(const uint16_t* p, int64_t n) { return load_bits_partial<VecU16>(p, n); }
inline VecF load_partial(const float* p, int64_t n) { return load_lanes(p, n); }
inline void store_partial(float* p, VecF v, int64_t n) { store_lanes(p, v, n); }

inline void store_past_caches(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

inline VecU32 widen(VecU16 x) { return __builtin_convertvector(x, VecU32); }

inline void unpack(Bytes32 x, VecF* v) {
    uint8_t bytes[kChunk];
    std::memcpy(bytes, &x, sizeof(bytes));
    for (int i = 0; i < kChunkVectors; ++i) v[i] = to_floats(widen_signed(bytes + i * kLanes<float>));
}

inline VecDotsF repeat_four(const float* p) { return VecDotsF{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]}; }

inline VecCodes shifted_twice(const uint8_t* p, int low, int) {
    typedef uint16_t Words __attribute__((vector_size(kCodeBytes)));
    return (VecCodes)(load_bits<Words>(p) >> low);
}
inline VecCodes load_parts(const uint8_t* p, int64_t) { return load_bits<VecCodes>(p); }

}  // namespace kt::KT_ISA
