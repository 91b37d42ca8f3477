#pragma once

// The functions of isa/simd-inl.h that need no instructions of their own on an ISA with vectors of 16 or 32 bytes.

#include <cstdint>
#include <cstring>

#include "core/views.h"
#include "isa/simd-inl.h"

namespace kt::KT_ISA {

// The n bytes at p, n <= 8, then zeros. Assembled in registers, because a vector load right after narrower stores would
// have to wait for them.
inline uint64_t first_bytes(const uint8_t* p, int64_t n) {
    const auto parts = [&](auto type) {  // the first and the last bytes, which may overlap
        const auto* last = reinterpret_cast<const decltype(type)*>(p + n - sizeof(type));
        const auto* first = reinterpret_cast<const decltype(type)*>(p);
        return read(first) | static_cast<uint64_t>(read(last)) << 8 * (n - static_cast<int64_t>(sizeof(type)));
    };
    if (n == 8) return read(reinterpret_cast<const uint64_t*>(p));
    if (n >= 4) return parts(uint32_t{});
    if (n >= 2) return parts(uint16_t{});
    return n ? *p : 0;
}

// The n bytes at `from` as a vector, then zeros.
template <class V>
inline V first_bytes_of(const void* from, int64_t n) {
    static_assert(sizeof(V) <= 16);
    const auto* p = static_cast<const uint8_t*>(from);
    constexpr auto kWords = static_cast<int64_t>(sizeof(V) + 7) / 8;
    uint64_t words[kWords];
    for (int64_t i = 0; i < kWords; ++i) words[i] = n > 8 * i ? first_bytes(p + 8 * i, smaller(8, n - 8 * i)) : 0;
    if constexpr (sizeof(V) > 8) {
        typedef uint64_t Pair __attribute__((vector_size(16)));
        return (V)Pair{words[0], words[1]};
    } else {
        return load_bits<V>(words);
    }
}

inline VecU8 load_partial(const uint8_t* p, int64_t n) { return first_bytes_of<VecU8>(p, n); }
inline VecU16 load_partial(const uint16_t* p, int64_t n) { return first_bytes_of<VecU16>(p, 2 * n); }
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
inline VecCodes nibble_parts(const uint8_t* p, int64_t) {
    typedef uint16_t Words __attribute__((vector_size(16)));
    const auto low = load_bits<Words>(p), high = low >> 4;
    return (VecCodes)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) & 15;
}

}  // namespace kt::KT_ISA
