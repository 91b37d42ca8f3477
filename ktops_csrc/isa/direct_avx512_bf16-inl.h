#pragma once

// Steps of the direct kernels with VDPBF16PS.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "isa/direct-inl.h"

namespace kt::KT_ISA {

inline __mmask32 first_lanes(int64_t n) { return n < 32 ? (1u << n) - 1 : 0xffffffffu; }

template <>
struct DotStep<bfloat16> {
    static constexpr int64_t kWidth = 32;
    static constexpr int kParts = 1;
    static __m512bh load(const bfloat16* p, int64_t n, int) {
        return (__m512bh)(n == kWidth ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_lanes(n), p));
    }
    static __m512 add(__m512 sum, __m512bh x, __m512bh y) { return _mm512_dpbf16_ps(sum, x, y); }
};

// Two rows r, s of 32 columns are interleaved within 128-bit lanes, and sums stay in that order until they are stored:
//
//   unpacklo   r0 s0 .. r3 s3  | r8 s8 .. r11 s11  | r16 ..  | r24 ..     sums[0]: columns 0-3, 8-11, 16-19, 24-27
//   unpackhi   r4 s4 .. r7 s7  | r12 ..            | r20 ..  | r28 ..     sums[1]: columns 4-7, 12-15, 20-23, 28-31
template <>
struct ColumnStep<bfloat16> {
    using V = __m512bh;
    static constexpr int64_t kRows = 2, kColumns = 32;
    static constexpr int kVectors = 2;

    static void load(const bfloat16* w, int64_t stride, int64_t rows, int64_t n, __m512bh* out) {
        const __mmask32 mask = first_lanes(n);
        const __m512i even = _mm512_maskz_loadu_epi16(mask, w);
        const __m512i odd = rows > 1 ? _mm512_maskz_loadu_epi16(mask, w + stride) : _mm512_setzero_si512();
        out[0] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        out[1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    }
    static __m512bh spread(const bfloat16* a, int64_t rows) {
        return (__m512bh)_mm512_set1_epi32(rows > 1 ? read(reinterpret_cast<const int32_t*>(a)) : read(a).bits);
    }
    static __m512 add(__m512 sum, __m512bh x, __m512bh y) { return _mm512_dpbf16_ps(sum, x, y); }
    static void load_sums(const float* c, int64_t n, __m512* sums) {
        const __m512 low = _mm512_loadu_ps(c), high = n > 16 ? _mm512_loadu_ps(c + 16) : _mm512_setzero_ps();
        sums[0] = _mm512_shuffle_f32x4(low, high, 0x88);
        sums[1] = _mm512_shuffle_f32x4(low, high, 0xdd);
    }
    static void store_sums(float* c, int64_t n, const __m512* sums) {
        const __m512 low = _mm512_shuffle_f32x4(sums[0], sums[1], 0x44);
        const __m512 high = _mm512_shuffle_f32x4(sums[0], sums[1], 0xee);
        _mm512_storeu_ps(c, _mm512_shuffle_f32x4(low, low, 0xd8));
        if (n > 16) _mm512_storeu_ps(c + 16, _mm512_shuffle_f32x4(high, high, 0xd8));
    }
};

}  // namespace kt::KT_ISA
