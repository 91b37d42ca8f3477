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

inline VecDots dot4(VecDots sum, VecCodes weights, VecCodes x) {
    const VecDots w = (VecDots)weights, a = (VecDots)x;
    for (int byte = 0; byte < 4; ++byte) sum += ((w >> 8 * byte) & 255) * ((a << (24 - 8 * byte)) >> 24);
    return sum;
}

}  // namespace kt::KT_ISA
