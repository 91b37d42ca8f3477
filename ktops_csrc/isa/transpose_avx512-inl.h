#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt::KT_ISA {

// 16 x 16 dwords in four rounds of swaps: dwords, pairs, quads, halves.
//
//   unpack epi32   a0 b0 a1 b1 | ...      unpack epi64   a0 b0 c0 d0 | ...
//   shuffle i32x4  128-bit blocks 0, 2 of two registers, then again: rows of the result
//
// put(k, dword k of every row)
template <class Put>
inline __attribute__((always_inline)) void transpose_16x16_avx512(const char* rows, int64_t stride, Put put) {
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

inline void transpose_16x16_avx512(const char* rows, int64_t stride, uint32_t* out) {
    transpose_16x16_avx512(rows, stride, [&](int k, __m512i x) { _mm512_storeu_si512(out + 16 * k, x); });
}

}  // namespace kt::KT_ISA
