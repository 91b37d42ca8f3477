#pragma once

// bf16, fp16, fp32: weights as they are.
//
// A decoder is a type with
//   kBlock, kBytes            weights that are decoded from so many bytes: 32, or the format's own block
//   kSplit                    the order of a chunk (isa/chunk-inl.h)
//   kFactor                   by which values are to be multiplied, besides their scale
//   decode(block, part, v)    chunk number `part` of a block

#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

struct PlainBfloat16 {
    static constexpr int64_t kBlock = kChunk, kBytes = 2 * kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;

    static void decode(const uint8_t* block, int64_t, VecF* v) {
        const auto* p = reinterpret_cast<const bfloat16*>(block);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = load(p + i * kLanes<float>);
    }
};

struct PlainFloat16 {
    static constexpr int64_t kBlock = kChunk, kBytes = 2 * kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;

    static void decode(const uint8_t* block, int64_t, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = load_float16(block + 2 * i * kLanes<float>);
    }
};

struct PlainFloat32 {
    static constexpr int64_t kBlock = kChunk, kBytes = 4 * kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;

    static void decode(const uint8_t* block, int64_t, VecF* v) {
        const auto* p = reinterpret_cast<const float*>(block);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = load(p + i * kLanes<float>);
    }
};

}  // namespace kt::KT_ISA
