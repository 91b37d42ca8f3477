#pragma once

// E4M3 numbers looked up with VPERMI2B: in bfloat16, which holds each exactly, a byte of the magnitude gives two.

#include <immintrin.h>

#include <cstdint>

#include "isa/simd-inl.h"

namespace kt::KT_ISA {

// The low (byte 0) or high (byte 1) bytes of the magnitudes in bfloat16. E4M3 numbers have 4 bits of exponent, biased
// by 7, and 3 of mantissa; those without exponent are multiples of 2^-9, and 0x7f is NaN.
struct alignas(64) Fp8Magnitudes {
    uint8_t bytes[128] = {};

    explicit constexpr Fp8Magnitudes(int byte) {
        for (int i = 0; i < 128; ++i) {
            int exponent = i >> 3, mantissa = i & 7;
            if (exponent == 0 && mantissa) {  // to 1.x times a smaller power of two
                for (exponent = 1; mantissa < 8; mantissa *= 2) --exponent;
                mantissa -= 8;
            }
            const int bits = i == 0x7f ? 0x7fc0 : i == 0 ? 0 : (exponent + 127 - 7) << 7 | mantissa << 4;
            bytes[i] = static_cast<uint8_t>(byte ? bits >> 8 : bits);
        }
    }

    __m512i operator[](__m512i index) const {
        return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), index, _mm512_load_si512(bytes + 64));
    }
};

// Converts E4M3 numbers to one chunk, split (isa/chunk-inl.h), or to two. Permuting quadwords first leaves the words of
// the first chunk to VPUNPCKL, in order, and those of the second to VPUNPCKH:
//
//   VPERMQ      0-7 32-39 | 8-15 40-47 | 16-23 48-55 | 24-31 56-63
//   VPERMI2B    their low bytes; their high bytes
//   VPUNPCKL    0-7       | 8-15       | 16-23       | 24-31          words, of which a VecF is every second
template <int kChunks>
inline __attribute__((always_inline)) void unpack_fp8_exactly(const uint8_t* p, VecF* v) {
    static constexpr Fp8Magnitudes kLow(0), kHigh(1);
    const __m512i bytes = kChunks > 1 ? _mm512_loadu_si512(p)
                                      : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i x = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
    const __m512i low = kLow[x], sign = _mm512_set1_epi8(-128), odd = _mm512_set1_epi32(-0x10000);
    const __m512i high = _mm512_ternarylogic_epi64(kHigh[x], x, sign, 0xf8);  // | (x & sign)
#pragma GCC unroll 2
    for (int c = 0; c < kChunks; ++c) {
        const __m512i words = c ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
        v[2 * c] = (VecF)_mm512_slli_epi32(words, 16);
        v[2 * c + 1] = (VecF)_mm512_and_si512(words, odd);
    }
}

}  // namespace kt::KT_ISA
