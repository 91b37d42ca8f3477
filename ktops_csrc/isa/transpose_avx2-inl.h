#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt::KT_ISA {

// 8 x 8 dwords: pairs of rows, pairs of pairs, then halves. out rows are 16 dwords apart.
inline void transpose_8x8_avx2(const char* rows, int64_t stride, uint32_t* out) {
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

// 16 x 16 dwords: out[16 * k + n] = row n, dword k.
inline void transpose_16x16_avx2(const char* rows, int64_t stride, uint32_t* out) {
    for (int n = 0; n < 16; n += 8) {
        for (int k = 0; k < 16; k += 8) transpose_8x8_avx2(rows + n * stride + 4 * k, stride, out + 16 * k + n);
    }
}

}  // namespace kt::KT_ISA
