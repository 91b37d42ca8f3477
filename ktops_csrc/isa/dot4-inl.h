#pragma once

// Integer dot products: unsigned codes of weights times signed codes of activations, four products a lane of 32 bits.

#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kCodeBytes = KT_VECTOR_BYTES == 64 ? 64 : 32;
constexpr int kDotLanes = static_cast<int>(kCodeBytes / 4);
typedef uint8_t VecCodes __attribute__((vector_size(kCodeBytes)));
typedef int32_t VecDots __attribute__((vector_size(kCodeBytes)));
typedef float VecDotsF __attribute__((vector_size(kCodeBytes)));

inline VecDots dot4(VecDots sum, VecCodes weights, VecCodes x) {
#ifdef KT_INT8_DOT
    return (VecDots)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#else
    const VecDots w = (VecDots)weights, a = (VecDots)x;
    for (int byte = 0; byte < 4; ++byte) sum += ((w >> 8 * byte) & 255) * ((a << (24 - 8 * byte)) >> 24);
    return sum;
#endif
}

inline VecDotsF dots_to_floats(VecDots x) { return __builtin_convertvector(x, VecDotsF); }

// Four numbers, again and again.
inline VecDotsF repeat_four(const float* p) {
#if KT_VECTOR_BYTES == 64
    return (VecDotsF)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#else
    return VecDotsF{p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3]};
#endif
}

// One register: lanes beyond it are added to those in it.
inline VecF in_one_register(VecDotsF x) {
    if constexpr (sizeof(VecDotsF) == sizeof(VecF)) {
        return bit_cast<VecF>(x);
    } else {
        VecF parts[sizeof(VecDotsF) / sizeof(VecF)];
        std::memcpy(parts, &x, sizeof(x));
        return parts[0] + parts[1];
    }
}

// kCodeBytes bytes: the 32 at p shifted right by `low` bits, and where there are 64 again by `high` bits. Bits of a
// byte's neighbour come in from above.
inline VecCodes shifted_twice(const uint8_t* p, int low, int high) {
    typedef uint16_t Words __attribute__((vector_size(kCodeBytes)));
#if KT_VECTOR_BYTES == 64
    const auto bytes = (Words)_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    Words shifts;
    for (int i = 0; i < 32; ++i) shifts[i] = static_cast<uint16_t>(i < 16 ? low : high);
    return (VecCodes)_mm512_srlv_epi16((__m512i)bytes, (__m512i)shifts);
#else
    static_cast<void>(high);
    return (VecCodes)(load_bits<Words>(p) >> low);
#endif
}

inline void split_nibbles(VecCodes bytes, VecCodes* low, VecCodes* high) {
    typedef uint16_t Words __attribute__((vector_size(kCodeBytes)));
    *low = bytes & 15;
    *high = (VecCodes)((Words)bytes >> 4) & 15;
}

// 32 bytes at p, and where there are 64 those `apart` bytes behind them.
inline VecCodes load_parts(const uint8_t* p, int64_t apart) {
#if KT_VECTOR_BYTES == 64
    const auto* parts = reinterpret_cast<const __m256i*>(p);
    const auto* second = reinterpret_cast<const __m256i*>(p + apart);
    return (VecCodes)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(parts)), _mm256_loadu_si256(second),
                                        1);
#else
    static_cast<void>(apart);
    return load_bits<VecCodes>(p);
#endif
}

// The same of four-bit codes: the low halves of 16 bytes, then their high halves.
inline VecCodes nibble_parts(const uint8_t* p, int64_t apart) {
    typedef uint16_t Words __attribute__((vector_size(kCodeBytes)));
#if KT_VECTOR_BYTES >= 32
    const auto twice = [](const uint8_t* part) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
    };
#endif
    Words shifts;
    for (int i = 0; i < static_cast<int>(kCodeBytes) / 2; ++i) shifts[i] = i / 8 % 2 ? 4 : 0;
#if KT_VECTOR_BYTES == 64
    const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(twice(p)), twice(p + apart), 1);
    return (VecCodes)_mm512_srlv_epi16(bytes, (__m512i)shifts) & 15;
#else
    static_cast<void>(apart);
#if KT_VECTOR_BYTES == 32
    const auto bytes = (Words)twice(p);
#else
    Words bytes;
    std::memcpy(&bytes, p, 16);
    std::memcpy(reinterpret_cast<char*>(&bytes) + 16, p, 16);
#endif
    return (VecCodes)(bytes >> shifts) & 15;
#endif
}

// table[index] of every byte, index < 16.
inline VecCodes lookup_codes(const uint8_t* table, VecCodes index) {
#if KT_VECTOR_BYTES == 64
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (VecCodes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), (__m512i)index);
#elif KT_VECTOR_BYTES == 32
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (VecCodes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), (__m256i)index);
#else
    VecCodes out;
    for (int i = 0; i < kCodeBytes; ++i) out[i] = table[index[i]];
    return out;
#endif
}

// Four-bit codes as bytes: the low halves of kBytes bytes, then their high halves.
template <int64_t kBytes>
inline void nibble_codes(const uint8_t* p, VecCodes* out) {
    if constexpr (kBytes < kCodeBytes) {
        out[0] = shifted_twice(p, 0, 4) & 15;
    } else {
        constexpr int64_t n = kBytes / kCodeBytes;
        for (int64_t i = 0; i < n; ++i) split_nibbles(load_bits<VecCodes>(p + i * kCodeBytes), out + i, out + n + i);
    }
}

}  // namespace kt::KT_ISA
