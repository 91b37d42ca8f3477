#pragma once

// A format for the test: a byte q per weight, whose value is (q - 100) times the scale.

#include "formats/decoder-inl.h"

namespace kt::KT_ISA {

struct Toy : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) {
        for (int i = 0; i < kChunkVectors; ++i) v[i] = to_floats(widen_unsigned(block + i * kLanes<float>) - 100);
    }
};

}  // namespace kt::KT_ISA
