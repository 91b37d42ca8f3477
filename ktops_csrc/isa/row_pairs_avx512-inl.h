#pragma once

// Two rows r, s of 32 columns of bfloat16, interleaved within 128-bit lanes, which takes one instruction a register.
// Sums of their products stay in that order until they are stored:
//
//   unpacklo   r0 s0 .. r3 s3  | r8 s8 .. r11 s11  | r16 ..  | r24 ..     sums[0]: columns 0-3, 8-11, 16-19, 24-27
//   unpackhi   r4 s4 .. r7 s7  | r12 ..            | r20 ..  | r28 ..     sums[1]: columns 4-7, 12-15, 20-23, 28-31

#include <immintrin.h>

#include <cstdint>

namespace kt::KT_ISA {

inline void interleave_rows(__m512i r, __m512i s, __m512i* out) {
    out[0] = _mm512_unpacklo_epi16(r, s);
    out[1] = _mm512_unpackhi_epi16(r, s);
}

// Loads and stores the sums of n columns: up to 16, or 32.
inline void load_column_sums(const float* c, int64_t n, __m512* sums) {
    const __m512 low = _mm512_loadu_ps(c), high = n > 16 ? _mm512_loadu_ps(c + 16) : _mm512_setzero_ps();
    sums[0] = _mm512_shuffle_f32x4(low, high, 0x88);
    sums[1] = _mm512_shuffle_f32x4(low, high, 0xdd);
}
inline void store_column_sums(float* c, int64_t n, const __m512* sums) {
    const __m512 low = _mm512_shuffle_f32x4(sums[0], sums[1], 0x44);
    const __m512 high = _mm512_shuffle_f32x4(sums[0], sums[1], 0xee);
    _mm512_storeu_ps(c, _mm512_shuffle_f32x4(low, low, 0xd8));
    if (n > 16) _mm512_storeu_ps(c + 16, _mm512_shuffle_f32x4(high, high, 0xd8));
}

}  // namespace kt::KT_ISA
