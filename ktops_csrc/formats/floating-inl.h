#pragma once

// fp8_e4m3 and mxfp8: sign, 4 bits of exponent, 3 of mantissa. mxfp4: E2M1, two weights a byte as in int4.

#include "formats/integer-inl.h"

namespace kt::KT_ISA {

struct Fp8 : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk;
    static constexpr float kFactor = kFp8Factor;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { unpack_fp8(block, v); }
};

struct Fp4 : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk / 2;
    static constexpr bool kSplit = true;
    alignas(64) static constexpr float kTable[16] = {0,     0.5f,  1,     1.5f,  2,     3,     4,     6,
                                                     -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { decode_nibbles(block, kTable, v); }
};

}  // namespace kt::KT_ISA
