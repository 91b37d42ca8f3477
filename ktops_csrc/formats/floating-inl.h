#pragma once

// fp8_e4m3 and mxfp8: sign, 4 bits of exponent, 3 of mantissa. mxfp4: E2M1, two weights a byte as in int4.

#include "formats/integer-inl.h"

namespace kt::KT_ISA {

struct Fp8 {
    static constexpr int64_t kBlock = kChunk, kBytes = kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = kFp8Factor;

    static void decode(const uint8_t* block, int64_t, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = fp8_values(block + i * kLanes<float>);
    }
};

struct Fp4 {
    static constexpr int64_t kBlock = kChunk, kBytes = kChunk / 2;
    static constexpr bool kSplit = true;
    static constexpr float kFactor = 1;
    alignas(64) static constexpr float kTable[16] = {0,     0.5f,  1,     1.5f,  2,     3,     4,     6,
                                                     -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

    static void decode(const uint8_t* block, int64_t, VecF* v) { decode_nibbles(block, kTable, v); }
};

}  // namespace kt::KT_ISA
