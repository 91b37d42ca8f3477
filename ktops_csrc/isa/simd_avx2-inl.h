#pragma once

// isa/simd-inl.h with AVX2 and F16C.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "isa/simd-inl.h"
#include "isa/simd_portable-inl.h"

namespace kt::KT_ISA {

// 8 x 8 dwords: pairs of rows, pairs of pairs, then halves. out rows are 16 dwords apart.
inline void transpose_8x8(const char* rows, int64_t stride, uint32_t* out) {
    __m256i r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + i * stride));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        auto* to = reinterpret_cast<__m256i*>(out + 16 * i);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_storeu_si256(to + 8, _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));  // row i + 4
    }
}

inline void transpose_16x16(const char* rows, int64_t stride, uint32_t* out) {
    for (int n = 0; n < 16; n += 8) {
        for (int k = 0; k < 16; k += 8) transpose_8x8(rows + n * stride + 4 * k, stride, out + 16 * k + n);
    }
}

inline VecI32 widen_unsigned(const uint8_t* p) {
    return (VecI32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline VecI32 widen_signed(const uint8_t* p) {
    return (VecI32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline VecF load_partial(const float* p, int64_t n) {
    return (VecF)_mm256_maskload_ps(p, (__m256i)(lane_indices() < static_cast<int32_t>(n)));
}

inline float float16_at(const void* p) {
    const auto bits = read(static_cast<const uint16_t*>(p));
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
inline VecF from_float16(VecU16 x) { return (VecF)_mm256_cvtph_ps((__m128i)x); }
inline VecU16 to_float16(VecF x) { return (VecU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

inline void unpack_fp8(const uint8_t* p, VecF* v) {
    for (int i = 0; i < kChunkVectors; i += 2) {
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
        const __m256i magnitude = _mm256_set1_epi16(0x7f);
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, magnitude), magnitude);
        const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 1);
        const __m256i bits = _mm256_blendv_epi8(
            _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))), _mm256_set1_epi16(0x7e00), nan);
        v[i] = (VecF)_mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        v[i + 1] = (VecF)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    }
}

inline VecF lookup(const float* table, VecI32 index) {
    const __m256i i = (__m256i)index;
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return (VecF)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
inline VecCodes lookup_codes(const uint8_t* table, VecCodes index) {
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (VecCodes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), (__m256i)index);
}

inline VecDots multiply_words(VecWords a, VecWords b) { return (VecDots)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline VecWords multiply_bytes(VecCodes a, VecCodes b) {
    return (VecWords)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
}

}  // namespace kt::KT_ISA
