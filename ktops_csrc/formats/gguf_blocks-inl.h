#pragma once

// ggml's blocks of 32 weights: d (and m) in binary16, then codes. Four-bit codes: byte i holds weight i in its low half
// and weight 16 + i in its high half. The fifth bit of weight i is bit i of qh.
//
//   q8_0  d  q[32]               d q             q5_0  d  qh[4]  q[16]       d (q - 16)
//   q4_0  d  q[16]               d (q - 8)       q5_1  d  m  qh[4]  q[16]    d q + m
//   q4_1  d  m  q[16]            d q + m         iq4_nl  d  q[16]            d table[q]
//
// Source: ggml-common.h and the dequantize functions of ggml and of the gguf package.

#include <cstdint>

#include "formats/decoder-inl.h"
#include "isa/dot4-inl.h"

namespace kt::KT_ISA {

// Calls f(codes 0..15 of the lanes, index of the vector) for the four-bit codes of 32 weights.
template <class F>
inline void for_each_nibble(const uint8_t* q, F f) {
    constexpr int L = kLanes<float>;
    for (int i = 0; i < kChunkVectors / 2; ++i) {
        const VecI32 bytes = widen_unsigned(q + i * L);
        f(bytes & 15, i);
        f(bytes >> 4, kChunkVectors / 2 + i);
    }
}

// Bit `first + lane` of 32 bits, as 16 or 0.
inline VecI32 fifth_bits(const uint8_t* qh, int64_t first) {
    const VecU32 bits = VecU32{} + (read(reinterpret_cast<const uint32_t*>(qh)) >> first);
    return (VecI32)((bits >> (VecU32)lane_indices()) << 4) & 16;
}

// Codes of units of four blocks, each of which starts with d.
template <int64_t kBlockBytes>
struct BlockCodes : ChunkDecoder {
    static constexpr int64_t kBytes = kBlockBytes;

    static constexpr int64_t kCodeColumns = 128, kCodeStep = 4 * kBytes, kCodeGroup = 32;
    static constexpr bool kPairs = false, kMins = false;
    static constexpr int kCodesAByte = 0;
    static void code_scales(const uint8_t* unit, float* out) {
        VecU16 halves{};
        for (int i = 0; i < 4; ++i) halves[i] = read(reinterpret_cast<const uint16_t*>(unit + i * kBytes));
        store(out, from_float16(halves));
        for (int i = kLanes<float>; i < 16; i += kLanes<float>) store(out + i, VecF{});
    }

protected:
    // Calls load(codes of a block, bytes from one block to the next) for every vector of a unit.
    template <class F>
    static void for_each_vector_of_codes(const uint8_t* unit, VecCodes* out, F load) {
        constexpr int64_t kBlocks = kCodeBytes / kChunk;
        for (int64_t i = 0; i < kCodeColumns / kCodeBytes; ++i) {
            out[i] = load(unit + i * kBlocks * kBytes + 2, kBytes);
        }
    }
};

struct Q8_0 : BlockCodes<34> {
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = to_floats(widen_signed(block + 2 + i * kLanes<float>)) * d;
    }

    static constexpr int kZeroCode = 128, kMaxCode = 255;
    static void codes(const uint8_t* unit, VecCodes* out) {
        for_each_vector_of_codes(unit, out, [](auto... at) { return load_parts(at...) ^ 0x80; });
    }
};

struct Q4_0 : BlockCodes<18> {
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block);
        for_each_nibble(block + 2, [&](VecI32 q, int i) { v[i] = to_floats(q - 8) * d; });
    }

    static constexpr int kZeroCode = 8, kMaxCode = 15;
    static void codes(const uint8_t* unit, VecCodes* out) {
        for_each_vector_of_codes(unit, out, [](auto... at) { return nibble_parts(at...); });
    }
};

struct Q4_1 : ChunkDecoder {
    static constexpr int64_t kBytes = 20;
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block), m = float16_at(block + 2);
        for_each_nibble(block + 4, [&](VecI32 q, int i) { v[i] = to_floats(q) * d + m; });
    }
};

struct Q5_0 : ChunkDecoder {
    static constexpr int64_t kBytes = 22;
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block);
        for_each_nibble(block + 6, [&](VecI32 q, int i) {
            v[i] = to_floats((q | fifth_bits(block + 2, i * kLanes<float>)) - 16) * d;
        });
    }
};

struct Q5_1 : ChunkDecoder {
    static constexpr int64_t kBytes = 24;
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block), m = float16_at(block + 2);
        for_each_nibble(block + 8, [&](VecI32 q, int i) {
            v[i] = to_floats(q | fifth_bits(block + 4, i * kLanes<float>)) * d + m;
        });
    }
};

// The values of the non-linear four-bit formats.
alignas(64) constexpr float kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

constexpr int kNonLinearZero = 128;
constexpr uint8_t kNonLinearCodes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4_NL : BlockCodes<18> {
    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const float d = float16_at(block);
        for_each_nibble(block + 2, [&](VecI32 q, int i) { v[i] = lookup(kNonLinear, q) * d; });
    }

    static constexpr int kZeroCode = kNonLinearZero, kMaxCode = kNonLinearCodes[15];
    static void codes(const uint8_t* unit, VecCodes* out) {
        for_each_vector_of_codes(unit, out,
                                 [](auto... at) { return lookup_codes(kNonLinearCodes, nibble_parts(at...)); });
    }
};

}  // namespace kt::KT_ISA
