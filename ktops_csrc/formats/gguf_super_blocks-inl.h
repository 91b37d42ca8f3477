#pragma once

// The super-blocks of 256 weights of ggml ("k-quants", iq4_xs): eight chunks of 32, with integer scales of their own
// under d (and dmin) in binary16. p: number of a chunk, h = p / 4 of its half, i of a weight in it.
//
//   q2_k   scales[16]  q[64]  d  dmin             q = q[32h + i] >> 2 (p % 4), 2 bits; 16 weights share a byte of
//   scales q3_k   hmask[32]  q[64]  scales[12]  d        the same, less 4 unless bit p of hmask[i] q4_k   d  dmin
//   scales[12]  q[128]            q[32 (p / 2) + i], low or high half q5_k   d  dmin  scales[12]  qh[32]  q[128]    the
//   same, and bit p of qh[i] q6_k   ql[128]  qh[64]  scales[16]  d         4 bits of ql[64h + 32 (p % 2) + i], 2 of
//   qh[32h + i]; less 32 iq4_xs d  scales_h[2]  scales_l[4]  q[128]    as iq4_nl, 16 bytes a chunk
//
// Source: ggml-common.h and the dequantize functions of ggml and of the gguf package.

#include "formats/gguf_blocks-inl.h"

namespace kt::KT_ISA {

struct GgufSuperBlock {
    static constexpr int64_t kBlock = 256;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;

    // The half of a chunk, 16 weights, that vector v of it lies in.
    static int64_t half(int v) { return v * kLanes<float> / 16; }
};

struct Q2_K : GgufSuperBlock {
    static constexpr int64_t kBytes = 84;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const float d = float16(block + 80), dmin = float16(block + 82);
        const uint8_t* q = block + 16 + 32 * (p / 4);
        for (int i = 0; i < kChunkVectors; ++i) {
            const uint8_t scale = block[2 * p + half(i)];
            const VecI32 codes = (widen_unsigned(q + i * kLanes<float>) >> static_cast<int>(2 * (p % 4))) & 3;
            v[i] = to_floats(codes) * (d * static_cast<float>(scale & 15)) - dmin * static_cast<float>(scale >> 4);
        }
    }
};

struct Q3_K : GgufSuperBlock {
    static constexpr int64_t kBytes = 110;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const float d = float16(block + 108);
        const uint8_t* q = block + 32 + 32 * (p / 4);
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecI32 low = (widen_unsigned(q + i * kLanes<float>) >> static_cast<int>(2 * (p % 4))) & 3;
            const VecI32 mask = (widen_unsigned(block + i * kLanes<float>) >> static_cast<int>(p)) & 1;
            v[i] = to_floats(low + 4 * mask - 4) * (d * static_cast<float>(scale(block + 96, 2 * p + half(i))));
        }
    }

private:
    // Sixteen scales of 6 bits, less 32: four bits in bytes 0 to 7, two in bytes 8 to 11.
    static int scale(const uint8_t* scales, int64_t i) {
        const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
        const int high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
        return (low | high << 4) - 32;
    }
};

// Scale and minimum of chunk p, 6 bits each, of q4_k and q5_k: the first four in bytes 0 to 3 and 4 to 7, the others in
// the halves of bytes 8 to 11 and the upper two bits of bytes 0 to 7.
struct ScaleAndMin {
    float scale, min;
    ScaleAndMin(const uint8_t* block, int64_t p) {
        const uint8_t* s = block + 4;
        const int a = p < 4 ? s[p] & 63 : (s[p + 4] & 15) | s[p - 4] >> 6 << 4;
        const int b = p < 4 ? s[p + 4] & 63 : s[p + 4] >> 4 | s[p] >> 6 << 4;
        scale = float16(block) * static_cast<float>(a);
        min = float16(block + 2) * static_cast<float>(b);
    }
};

struct Q4_K : GgufSuperBlock {
    static constexpr int64_t kBytes = 144;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const ScaleAndMin s(block, p);
        const uint8_t* q = block + 16 + 32 * (p / 2);
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecI32 codes = (widen_unsigned(q + i * kLanes<float>) >> static_cast<int>(4 * (p % 2))) & 15;
            v[i] = to_floats(codes) * s.scale - s.min;
        }
    }
};

struct Q5_K : GgufSuperBlock {
    static constexpr int64_t kBytes = 176;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const ScaleAndMin s(block, p);
        const uint8_t* q = block + 48 + 32 * (p / 2);
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecI32 low = (widen_unsigned(q + i * kLanes<float>) >> static_cast<int>(4 * (p % 2))) & 15;
            const VecI32 high = (widen_unsigned(block + 16 + i * kLanes<float>) >> static_cast<int>(p)) & 1;
            v[i] = to_floats(low | high << 4) * s.scale - s.min;
        }
    }
};

struct Q6_K : GgufSuperBlock {
    static constexpr int64_t kBytes = 210;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const float d = float16(block + 208);
        const int64_t h = p / 4, r = p % 4;
        const uint8_t* ql = block + 64 * h + 32 * (r % 2);
        const uint8_t* qh = block + 128 + 32 * h;
        const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
        for (int i = 0; i < kChunkVectors; ++i) {
            const VecI32 low = (widen_unsigned(ql + i * kLanes<float>) >> static_cast<int>(4 * (r / 2))) & 15;
            const VecI32 high = (widen_unsigned(qh + i * kLanes<float>) >> static_cast<int>(2 * r)) & 3;
            const float scale = d * static_cast<float>(scales[2 * p + half(i)]);
            v[i] = to_floats((low | high << 4) - 32) * scale;
        }
    }
};

struct IQ4_XS : GgufSuperBlock {
    static constexpr int64_t kBytes = 136;
    static void decode(const uint8_t* block, int64_t p, VecF* v) {
        const int low = block[4 + p / 2] >> (4 * (p % 2)) & 15;
        const int high = read(reinterpret_cast<const uint16_t*>(block + 2)) >> (2 * p) & 3;
        const float scale = float16(block) * static_cast<float>((low | high << 4) - 32);
        for_each_nibble(block + 8 + 16 * p, [&](VecI32 q, int i) { v[i] = lookup(kNonLinear, q) * scale; });
    }
};

}  // namespace kt::KT_ISA
