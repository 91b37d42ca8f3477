#pragma once

// bf16, fp16, fp32: weights stored as floats.

#include <cstdint>

#include "formats/decoder-inl.h"

namespace kt::KT_ISA {

struct PlainBfloat16 : ChunkDecoder {
    static constexpr int64_t kBytes = 2 * kChunk;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const auto* p = reinterpret_cast<const bfloat16*>(block);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = load(p + i * kLanes<float>);
    }
};

struct PlainFloat16 : ChunkDecoder {
    static constexpr int64_t kBytes = 2 * kChunk;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = from_float16(load_bits<VecU16>(block + 2 * i * kLanes<float>));
    }
};

struct PlainFloat32 : ChunkDecoder {
    static constexpr int64_t kBytes = 4 * kChunk;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        const auto* p = reinterpret_cast<const float*>(block);
        for (int i = 0; i < kChunkVectors; ++i) v[i] = load(p + i * kLanes<float>);
    }
};

}  // namespace kt::KT_ISA
