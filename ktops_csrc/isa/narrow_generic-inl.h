#pragma once

// Rounding to bfloat16 and dot products of bytes, for ISAs without instructions for them.

#include <cstring>

#include "core/bfloat16.h"
#include "isa/chunk-inl.h"
#include "isa/dot4-inl.h"
#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

template <bool kSplit>
inline void store_chunk(const VecF* v, bfloat16* out) {
    constexpr int L = kLanes<float>, N = kChunkVectors;
    for (int i = 0; i < (kSplit ? N / 2 : N); ++i) {
        if constexpr (kSplit) {
            const VecU32 pairs = round_to_bfloat16(v[i]) | round_to_bfloat16(v[N / 2 + i]) << 16;
            std::memcpy(static_cast<void*>(out + 2 * i * L), &pairs, sizeof(pairs));
        } else {
            store(out + i * L, v[i]);
        }
    }
}

template <int kMaxCode>
inline VecDots dot4(VecDots sum, VecCodes weights, VecCodes x) {
    if constexpr (pairs_in_word(kMaxCode) > 0) {
        return add_words(sum, multiply_bytes(weights, x));
    } else {
        const auto w = (VecWords)weights, a = (VecWords)x;
        return sum + multiply_words(w & 255, (a << 8) >> 8) + multiply_words((w >> 8) & 255, a >> 8);
    }
}

}  // namespace kt::KT_ISA
