#pragma once

// isa/simd-inl.h with AVX-512: F, BW, DQ and VL.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "isa/simd-inl.h"

namespace kt::KT_ISA {

inline VecU8 load_partial(const uint8_t* p, int64_t n) {
    return (VecU8)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
}
inline VecU16 load_partial(const uint16_t* p, int64_t n) {
    return (VecU16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
inline VecF load_partial(const float* p, int64_t n) {
    return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline void store_partial(float* p, VecF v, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}

inline void store_past_caches(float* p, VecF v) { _mm512_stream_ps(p, (__m512)v); }

// 16 x 16 dwords in four rounds of swaps: dwords, pairs, quads, halves.
//
//   unpack epi32   a0 b0 a1 b1 | ...      unpack epi64   a0 b0 c0 d0 | ...
//   shuffle i32x4  128-bit blocks 0, 2 of two registers, then again: rows of the result
//
// Calls put(k, dword k of every row).
template <class Put>
inline __attribute__((always_inline)) void transpose_16x16(const char* rows, int64_t stride, Put put) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        put(i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        put(i + 8, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

inline void transpose_16x16(const char* rows, int64_t stride, uint32_t* out) {
    transpose_16x16(rows, stride, [&](int k, __m512i x) { _mm512_storeu_si512(out + 16 * k, x); });
}

// GCC 12 compiles __builtin_convertvector of one zmm to five instructions.
inline VecU32 widen(VecU16 x) { return (VecU32)_mm512_cvtepu16_epi32((__m256i)x); }

inline VecI32 widen_unsigned(const uint8_t* p) {
    return (VecI32)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline VecI32 widen_signed(const uint8_t* p) {
    return (VecI32)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline float float16_at(const void* p) {
    const auto bits = read(static_cast<const uint16_t*>(p));
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
inline VecF from_float16(VecU16 x) { return (VecF)_mm512_cvtph_ps((__m256i)x); }
inline VecU16 to_float16(VecF x) { return (VecU16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }

inline void unpack(Bytes32 x, VecF* v) {
    v[0] = to_floats((VecI32)_mm512_cvtepi8_epi32(_mm256_castsi256_si128((__m256i)x)));
    v[1] = to_floats((VecI32)_mm512_cvtepi8_epi32(_mm256_extracti128_si256((__m256i)x, 1)));
}

inline void unpack_fp8(const uint8_t* p, VecF* v) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i magnitude = _mm512_set1_epi16(0x7f),
                  sign_and_digits = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, magnitude), magnitude);
    const __m512i shifted = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 1);
    const __m512i bits =
        _mm512_mask_mov_epi16(_mm512_and_si512(shifted, sign_and_digits), nan, _mm512_set1_epi16(0x7e00));
    v[0] = (VecF)_mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    v[1] = (VecF)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
}

inline VecF lookup(const float* table, VecI32 index) {
    return (VecF)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}
inline VecCodes lookup_codes(const uint8_t* table, VecCodes index) {
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (VecCodes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), (__m512i)index);
}

inline VecDots multiply_words(VecWords a, VecWords b) { return (VecDots)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline VecWords multiply_bytes(VecCodes a, VecCodes b) {
    return (VecWords)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
}

inline VecDotsF repeat_four(const float* p) { return (VecDotsF)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

inline VecCodes shifted_twice(const uint8_t* p, int low, int high) {
    const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    VecWords shifts;
    for (int i = 0; i < 32; ++i) shifts[i] = static_cast<int16_t>(i < 16 ? low : high);
    return (VecCodes)_mm512_srlv_epi16(bytes, (__m512i)shifts);
}
inline VecCodes load_parts(const uint8_t* p, int64_t apart) {
    const auto* parts = reinterpret_cast<const __m256i*>(p);
    const auto* second = reinterpret_cast<const __m256i*>(p + apart);
    return (VecCodes)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(parts)), _mm256_loadu_si256(second),
                                        1);
}
inline VecCodes nibble_parts(const uint8_t* p, int64_t apart) {
    const auto twice = [](const uint8_t* part) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
    };
    VecWords shifts;
    for (int i = 0; i < static_cast<int>(kCodeBytes) / 2; ++i) shifts[i] = i / 8 % 2 ? 4 : 0;
    const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(twice(p)), twice(p + apart), 1);
    return (VecCodes)_mm512_srlv_epi16(bytes, (__m512i)shifts) & 15;
}

}  // namespace kt::KT_ISA
