#pragma once

// int8, and int4 and uint4 with two weights per byte: byte b of a row holds column 2b in its low half and column 2b + 1
// in its high half. An int4 code q is the weight q - 8.

#include <cstdint>

#include "formats/decoder-inl.h"
#include "isa/dot4-inl.h"

namespace kt::KT_ISA {

struct Int8 : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = to_floats(widen_signed(block + i * kLanes<float>));
    }

    static constexpr int kZeroCode = 128, kMaxCode = 255;
    static constexpr int64_t kCodeColumns = 128, kCodeStep = 128, kCodeGroup = 0;
    static constexpr bool kPairs = false, kMins = false;
    static constexpr int kCodesAByte = 1;
    static void codes_of(VecCodes bytes, VecCodes* out) { out[0] = bytes ^ 0x80; }
    static void codes(const uint8_t* unit, VecCodes* out) {
        for (int64_t i = 0; i < kCodeColumns / kCodeBytes; ++i) {
            codes_of(load_bits<VecCodes>(unit + i * kCodeBytes), out + i);
        }
    }
};

// Sixteen bytes as pairs of table[low half], table[high half].
inline void decode_nibbles(const uint8_t* bytes, const float* table, VecF* v) {
    for (int i = 0; i < kChunkVectors / 2; ++i) {
        const VecI32 pairs = widen_unsigned(bytes + i * kLanes<float>);
        v[i] = lookup(table, pairs);
        v[kChunkVectors / 2 + i] = lookup(table, pairs >> 4);
    }
}

struct NibbleCodes {
    static constexpr int64_t kCodeColumns = 128, kCodeStep = 64, kCodeGroup = 0;
    static constexpr bool kPairs = true, kMins = false;
    static constexpr int kMaxCode = 15, kCodesAByte = 2;
    static void codes_of(VecCodes bytes, VecCodes* out) { split_nibbles(bytes, out, out + 1); }
    static void codes(const uint8_t* unit, VecCodes* out) { nibble_codes<64>(unit, out); }
};

struct Int4 : ChunkDecoder, NibbleCodes {
    static constexpr int kZeroCode = 8;
    static constexpr int64_t kBytes = kChunk / 2;
    static constexpr bool kSplit = true;
    alignas(64) static constexpr float kTable[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { decode_nibbles(block, kTable, v); }
};

struct UInt4 : ChunkDecoder, NibbleCodes {
    static constexpr int kZeroCode = 0;
    static constexpr int64_t kBytes = kChunk / 2;
    static constexpr bool kSplit = true;
    alignas(64) static constexpr float kTable[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { decode_nibbles(block, kTable, v); }
};

}  // namespace kt::KT_ISA
