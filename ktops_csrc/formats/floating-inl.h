#pragma once

// fp8_e4m3 and mxfp8: sign, 4 bits of exponent, 3 of mantissa. mxfp4: E2M1, two weights per byte as in int4.

#include <cstdint>

#include "formats/integer-inl.h"

namespace kt::KT_ISA {

struct Fp8 : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk;
    static constexpr float kFactor = kFp8Factor;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { unpack_fp8(block, v); }
};

// The table holds twice the weights, which are integers.
struct Fp4 : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk / 2;
    static constexpr bool kSplit = true;
    static constexpr float kFactor = 0.5f;
    alignas(64) static constexpr float kTable[16] = {0,     1,     2,     3,     4,     6,     8,     12,
                                                     -0.0f, -1.0f, -2.0f, -3.0f, -4.0f, -6.0f, -8.0f, -12.0f};

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { decode_nibbles(block, kTable, v); }

    static constexpr int kZeroCode = 12, kMaxCode = 24;
    static constexpr uint8_t kCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    static constexpr int64_t kCodeColumns = 128, kCodeStep = 64, kCodeGroup = 0;
    static constexpr bool kPairs = true, kMins = false;
    static constexpr int kCodesAByte = 2;
    static void codes_of(VecCodes bytes, VecCodes* out) {
        split_nibbles(bytes, out, out + 1);
        for (int i = 0; i < 2; ++i) out[i] = lookup_codes(kCodes, out[i]);
    }
    static void codes(const uint8_t* unit, VecCodes* out) {
        nibble_codes<64>(unit, out);
        for (int64_t i = 0; i < kCodeColumns / kCodeBytes; ++i) out[i] = lookup_codes(kCodes, out[i]);
    }
};

}  // namespace kt::KT_ISA
