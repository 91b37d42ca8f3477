#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "isa/peak-inl.h"

namespace kt::KT_ISA {

inline double peak_bfloat16_dot(int64_t iterations) {
    __m512i a = _mm512_set1_epi32(0x3f803f80), b = a;  // pairs of 1.0
    __asm__ volatile("" : "+m"(a), "+m"(b));
    return peak_flops<__m512>(
        iterations, 4.0 * 16, [a, b](__m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); },
        std::make_integer_sequence<int, kPeakChains>());
}

}  // namespace kt::KT_ISA
