#pragma once

// ggml's super-blocks of 256 weights ("k-quants", iq4_xs): eight chunks of 32 with integer scales, in units of d
// (and dmin) in binary16. p: index of a chunk; h = p / 4: of its half; i: of a weight in it.
//
//   q2_k    scales[16]  q[64]  d  dmin         q = q[32h + i] >> 2 (p % 4), 2 bits; 16 weights share a byte of scales
//   q3_k    hmask[32]  q[64]  scales[12]  d    the same, less 4 unless bit p of hmask[i]
//   q4_k    d  dmin  scales[12]  q[128]        q[32 (p / 2) + i], low or high half
//   q5_k    d  dmin  scales[12]  qh[32]  q[128]    the same, and bit p of qh[i]
//   q6_k    ql[128]  qh[64]  scales[16]  d     4 bits of ql[64h + 32 (p % 2) + i], 2 of qh[32h + i]; less 32
//   iq4_xs  d  scales_h[2]  scales_l[4]  q[128]    as iq4_nl, 16 bytes a chunk
//
// Source: ggml-common.h and the dequantize functions of ggml and of the gguf package.

#include <cstdint>
#include <cstring>

#include "formats/gguf_blocks-inl.h"

namespace kt::KT_ISA {

template <int kScales, int kMins>
struct SuperBlockDecoder {
    static constexpr int64_t kBlock = 256;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;
    static constexpr int kCodesAByte = 0;

    // One for every chunk, or for every half of one.
    struct State {
        float scale[kScales], min[kMins ? kMins : 1];
    };

    // The half of a chunk, 16 weights, that contains its vector v.
    static int64_t half(int v) { return v * kLanes<float> / 16; }
};

// out[i] = d * bytes[i] for any n.
inline void scale_bytes(const uint8_t* bytes, int n, float d, float* out) {
    constexpr int L = kLanes<float>;
    if (n % L == 0) {
        for (int i = 0; i < n; i += L) store(out + i, to_floats(widen_unsigned(bytes + i)) * d);
    } else {
        for (int i = 0; i < n; ++i) out[i] = d * static_cast<float>(bytes[i]);
    }
}

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

struct Q2_K : SuperBlockDecoder<16, 16> {
    static constexpr int64_t kBytes = 84;

    static State prepare(const uint8_t* block) {
        State s;
        Bytes16 both = load_bits<Bytes16>(block), low = both & 15, high = both >> 4;
        scale_bytes(reinterpret_cast<const uint8_t*>(&low), 16, float16_at(block + 80), s.scale);
        scale_bytes(reinterpret_cast<const uint8_t*>(&high), 16, float16_at(block + 82), s.min);
        return s;
    }
    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        const Bytes32 q = load_bits<Bytes32>(block + 16 + 32 * (p / 4));
        unpack(shift_right(q, 2 * (p % 4)) & 3, v);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = v[i] * s.scale[2 * p + half(i)] - s.min[2 * p + half(i)];
    }
};

struct Q3_K : SuperBlockDecoder<16, 0> {
    static constexpr int64_t kBytes = 110;

    // Sixteen 6-bit scales, less 32: four bits in bytes 0 to 7, two in bytes 8 to 11.
    static State prepare(const uint8_t* block) {
        uint32_t in[3], scales[4];
        std::memcpy(in, block + 96, sizeof(in));
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = i < 2 ? in[i] & 0x0f0f0f0f : in[i - 2] >> 4 & 0x0f0f0f0f;
            scales[i] = low | (in[2] >> 2 * i & 0x03030303) << 4;
        }
        State s;
        const float d = float16_at(block + 108);
        scale_bytes(reinterpret_cast<const uint8_t*>(scales), 16, 1, s.scale);
        for (float& scale : s.scale) scale = (scale - 32) * d;
        return s;
    }
    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        const Bytes32 q = load_bits<Bytes32>(block + 32 + 32 * (p / 4)), mask = load_bits<Bytes32>(block);
        const Bytes32 low = shift_right(q, 2 * (p % 4)) & 3, high = (shift_right(mask, p) & 1) << 2;
        unpack((low | high) - 4, v);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = v[i] * s.scale[2 * p + half(i)];
    }
};

// q4_k and q5_k: 6-bit scales and minima, the first four of each in bytes 0 to 3 and 4 to 7, the others in the halves
// of bytes 8 to 11 and the upper two bits of bytes 0 to 7.
struct ScaleAndMinDecoder : SuperBlockDecoder<8, 8> {
    // scale[8] and then min[8]
    struct State {
        float scale[16];
    };

    static State prepare(const uint8_t* block) {
        State s;
        scales(block, s.scale);
        return s;
    }

    static constexpr int kZeroCode = 0;
    static constexpr int64_t kCodeColumns = 256, kCodeGroup = 32;
    static constexpr bool kPairs = false, kMins = true;
    static void code_scales(const uint8_t* block, float* out) { scales(block, out); }

    static void scales(const uint8_t* block, float* out) {
        typedef uint32_t Words __attribute__((vector_size(16)));
        const auto x = load_bits<Words>(block);  // d and dmin, then the twelve bytes
        const Words whole = __builtin_shufflevector(x, x, 1, 3, 2, 3) >> Words{0, 0, 0, 4};
        const Words upper = __builtin_shufflevector(x, x, 1, 1, 2, 2) >> 2;
        const Words both = (whole & Words{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f}) |
                           (upper & Words{0, 0x30303030, 0, 0x30303030});
        constexpr int L = kLanes<float>;
        uint8_t bytes[16];
        std::memcpy(bytes, &both, sizeof(bytes));
        const VecF d = VecF{} + float16_at(block), dmin = VecF{} + float16_at(block + 2);
        for (int i = 0; i < 16; i += L) {
            const VecF factor = (VecF)(lane_indices() + i < 8 ? (VecI32)d : (VecI32)dmin);
            store(out + i, to_floats(widen_unsigned(bytes + i)) * factor);
        }
    }
    static void scale(const State& s, int64_t p, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = v[i] * s.scale[p] - s.scale[8 + p];
    }
};

struct Q4_K : ScaleAndMinDecoder {
    static constexpr int64_t kBytes = 144;
    static constexpr int kMaxCode = 15;

    static constexpr int64_t kCodeStep = kBytes;
    static void codes(const uint8_t* block, VecCodes* out) {
        for (int i = 0; i < 4; ++i) nibble_codes<32>(block + 16 + 32 * i, out + i * 64 / kCodeBytes);
    }

    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        const Bytes32 q = load_bits<Bytes32>(block + 16 + 32 * (p / 2));
        unpack(shift_right(q, 4 * (p % 2)) & 15, v);
        scale(s, p, v);
    }
};

struct Q5_K : ScaleAndMinDecoder {
    static constexpr int64_t kBytes = 176;
    static constexpr int kMaxCode = 31;

    static constexpr int64_t kCodeStep = kBytes;
    static void codes(const uint8_t* block, VecCodes* out) {
        constexpr int kVectors = 64 / static_cast<int>(kCodeBytes);
        for (int i = 0; i < 4; ++i, out += kVectors) {
            nibble_codes<32>(block + 48 + 32 * i, out);
            for (int v = 0; v < kVectors; ++v) {
                out[v] |= raise_by_four(shifted_twice(block + 16, 2 * i + v, 2 * i + 1)) & 16;
            }
        }
    }

    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        const Bytes32 q = load_bits<Bytes32>(block + 48 + 32 * (p / 2)), high = load_bits<Bytes32>(block + 16);
        unpack((shift_right(q, 4 * (p % 2)) & 15) | (shift_right(high, p) & 1) << 4, v);
        scale(s, p, v);
    }
};

struct Q6_K : SuperBlockDecoder<16, 0> {
    static constexpr int64_t kBytes = 210;

    static State prepare(const uint8_t* block) {
        State s;
        code_scales(block, s.scale);
        return s;
    }

    static constexpr int kZeroCode = 32, kMaxCode = 63;
    static constexpr int64_t kCodeColumns = 256, kCodeStep = kBytes, kCodeGroup = 16;
    static constexpr bool kPairs = false, kMins = false;
    static void codes(const uint8_t* block, VecCodes* out) {
        constexpr int kVectors = 128 / static_cast<int>(kCodeBytes), kShift = 8 / kVectors;
        for (int h = 0; h < 2; ++h) {
            nibble_codes<64>(block + 64 * h, out + h * kVectors);
            for (int v = 0; v < kVectors; ++v) {
                const VecCodes high = shifted_twice(block + 128 + 32 * h, kShift * v, kShift * v + 2);
                out[h * kVectors + v] |= raise_by_four(high) & 0x30;
            }
        }
    }
    static void code_scales(const uint8_t* block, float* out) {
        const float d = float16_at(block + 208);
        for (int i = 0; i < 16; i += kLanes<float>) store(out + i, to_floats(widen_signed(block + 192 + i)) * d);
    }
    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        const int64_t h = p / 4, r = p % 4;
        const Bytes32 low = load_bits<Bytes32>(block + 64 * h + 32 * (r % 2));
        const Bytes32 high = load_bits<Bytes32>(block + 128 + 32 * h);
        unpack(((shift_right(low, 4 * (r / 2)) & 15) | (shift_right(high, 2 * r) & 3) << 4) - 32, v);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = v[i] * s.scale[2 * p + half(i)];
    }
};

struct IQ4_XS : SuperBlockDecoder<8, 0> {
    static constexpr int64_t kBytes = 136;

    static State prepare(const uint8_t* block) {
        State s;
        float scales[16];
        code_scales(block, scales);
        std::memcpy(s.scale, scales, sizeof(s.scale));
        return s;
    }

    static constexpr int kZeroCode = kNonLinearZero, kMaxCode = kNonLinearCodes[15];
    static constexpr int64_t kCodeColumns = 256, kCodeStep = kBytes, kCodeGroup = 32;
    static constexpr bool kPairs = false, kMins = false;
    static void codes(const uint8_t* block, VecCodes* out) {
        for (int64_t i = 0; i < kCodeColumns / kCodeBytes; ++i) {
            out[i] = lookup_codes(kNonLinearCodes, nibble_parts(block + 8 + i * kCodeBytes / 2, 16));
        }
    }
    static void code_scales(const uint8_t* block, float* out) {
        const VecF d = VecF{} + float16_at(block);
        const VecU32 low = VecU32{} + read(reinterpret_cast<const uint32_t*>(block + 4)),
                     high = VecU32{} + read(reinterpret_cast<const uint16_t*>(block + 2));
        for (int i = 0; i < 16; i += kLanes<float>) {
            const VecI32 lanes = lane_indices() + i;
            const VecU32 p = (VecU32)lanes & 7, scale = (low >> 4 * p & 15) | (high >> 2 * p & 3) << 4;
            store(out + i, to_floats((VecI32)scale - 32) * (VecF)(lanes < 8 ? (VecI32)d : VecI32{}));
        }
    }

    static void decode(const uint8_t* block, const State& s, int64_t p, VecF* v) {
        for_each_nibble(block + 8 + 16 * p, [&](VecI32 q, int i) { v[i] = lookup(kNonLinear, q) * s.scale[p]; });
    }
};

}  // namespace kt::KT_ISA
