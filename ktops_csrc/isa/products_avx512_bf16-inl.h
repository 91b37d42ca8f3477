#pragma once

// A step of the micro-kernels with VDPBF16PS.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"

namespace kt::KT_ISA {

inline __m512bh load_bf16(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// acc[i][j] += the two elements of row i times the pairs in panel[j]. row(i): where they are.
template <int M, int P, class Row>
inline __attribute__((always_inline)) void add_pairs(__m512 (&acc)[M][P], const __m512bh (&panel)[P], Row row) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        const auto* two = reinterpret_cast<const int32_t*>(row(i));
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(read(two));
#pragma GCC unroll 8
        for (int j = 0; j < P; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], pair, panel[j]);
    }
}

}  // namespace kt::KT_ISA
