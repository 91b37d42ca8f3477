#pragma once

// A decoder is a type with
//   kBlock, kBytes                   weights that are decoded from so many bytes: 32, or the format's own block
//   kSplit                           the order of a chunk (isa/chunk-inl.h)
//   kFactor                          by which values are to be multiplied, besides their scale
//   State prepare(block)             what all chunks of a block need
//   decode(block, state, part, v)    chunk number `part` of a block
// and is named in formats.def.

#include <cstdint>

#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

struct NoState {};

// Of a format whose blocks are chunks.
struct ChunkDecoder {
    static constexpr int64_t kBlock = kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;
    using State = NoState;

    static NoState prepare(const uint8_t*) { return {}; }
};

}  // namespace kt::KT_ISA
