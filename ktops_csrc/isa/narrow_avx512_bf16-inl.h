#pragma once

// Rounding to bfloat16 with VCVTNE2PS2BF16, and dot products of bytes with VPDPBUSD.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "isa/chunk-inl.h"
#include "isa/dot4-inl.h"
#include "isa/simd-inl.h"

namespace kt::KT_ISA {

template <bool kSplit>
inline void store_chunk(const VecF* v, bfloat16* out) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    if constexpr (kSplit) {
        alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        both = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
    }
    _mm512_storeu_si512(out, both);
}

template <int kMaxCode>
inline VecDots dot4(VecDots sum, VecCodes weights, VecCodes x) {
    return (VecDots)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}

}  // namespace kt::KT_ISA
