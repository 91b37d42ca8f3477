#pragma once

// The tiles of a band, transposed into rows of C.

#include <immintrin.h>

#include "isa/bands-inl.h"
#include "isa/simd_avx512-inl.h"

namespace kt::KT_ISA {

// Stores the last `columns` columns of the transposes of a half's tiles: c + i * ldc has those of token i.
inline void put_band(const BandArguments<bfloat16>& g, int half, int64_t columns, float* c, int64_t ldc) {
    const int64_t before = kHalfRows - columns;
    const auto mask = static_cast<__mmask16>(0xffffu << before);
    for (int p = 0; p < g.panels; ++p, c += kPanelColumns * ldc) {
        const auto* tile = reinterpret_cast<const char*>(g.tile(half, p));
        transpose_16x16(tile, kPanelColumns * static_cast<int64_t>(sizeof(float)),
                        [&](int i, __m512i row) { _mm512_mask_storeu_epi32(c + i * ldc - before, mask, row); });
    }
}

}  // namespace kt::KT_ISA
