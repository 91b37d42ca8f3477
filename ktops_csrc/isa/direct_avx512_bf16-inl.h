#pragma once

// Steps of the direct kernels with VDPBF16PS.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "isa/direct-inl.h"
#include "isa/row_pairs_avx512-inl.h"

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

// Two rows at a time, interleaved.
template <>
struct ColumnStep<bfloat16> {
    using V = __m512bh;
    using Factor = bfloat16;
    static constexpr int64_t kRows = 2, kColumns = 32;
    static constexpr int kVectors = 2;

    static void load(const bfloat16* w, int64_t stride, int64_t rows, int64_t n, __m512bh* out) {
        const __mmask32 mask = first_lanes(n);
        const __m512i even = _mm512_maskz_loadu_epi16(mask, w);
        const __m512i odd = rows > 1 ? _mm512_maskz_loadu_epi16(mask, w + stride) : _mm512_setzero_si512();
        __m512i pairs[2];
        interleave_rows(even, odd, pairs);
        out[0] = (__m512bh)pairs[0];
        out[1] = (__m512bh)pairs[1];
    }
    static __m512bh spread(const bfloat16* a, int64_t rows) {
        return (__m512bh)_mm512_set1_epi32(rows > 1 ? read(reinterpret_cast<const int32_t*>(a)) : read(a).bits);
    }
    static __m512 add(__m512 sum, __m512bh x, __m512bh y) { return _mm512_dpbf16_ps(sum, x, y); }
    static void load_sums(const float* c, int64_t n, __m512* sums) { load_column_sums(c, n, sums); }
    static void store_sums(float* c, int64_t n, const __m512* sums) { store_column_sums(c, n, sums); }
};

}  // namespace kt::KT_ISA
