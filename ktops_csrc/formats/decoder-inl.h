#pragma once

// A decoder is a type with
//   kBlock, kBytes                   the weights of a block (32, or the format's own number) and its bytes
//   kSplit                           true if chunks are split (isa/chunk-inl.h)
//   kFactor                          a constant to multiply values by, in addition to their scale
//   State prepare(block)             computes what all chunks of a block need
//   decode(block, state, part, v)    decodes chunk number `part` of a block
//   kDecodesLines                    true if decode_line(blocks, v) decodes 64 bytes of blocks that are chunks
// and is listed in formats.def.
//
// A decoder of an integer format, whose codes are multiplied (weights/codes-inl.h), also has
//   kCodeColumns, kCodeStep   the columns and the bytes of a unit, whose codes are decoded together
//   kPairs                    true if a byte holds two columns: then the codes of a unit are those of its even columns
//                             followed by those of its odd columns, else they are in order
//   codes(unit, out)          decodes the codes of a unit to vectors
//   kCodesAByte               codes in each byte if bytes can be decoded one by one, else 0. The unit then has
//                             kCodesAByte equal parts; the codes of a byte are at the same index in each part, and
//                             codes_of(bytes, out) writes one vector for each part
//   kCodeGroup                columns that share a scale stored in the unit; 0: scales are in a tensor of their own
//   code_scales(unit, out)    writes the scales of a unit, followed by s z if kMins; zeros up to 16 numbers
//   kMaxCode                  no code exceeds it
//   kMins, kZeroCode          true if groups in a unit have zero points of their own; else z is kZeroCode

#include <cstdint>

#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

struct NoState {};

// The base of decoders whose blocks are chunks.
struct ChunkDecoder {
    static constexpr int64_t kBlock = kChunk;
    static constexpr bool kSplit = false;
    static constexpr float kFactor = 1;
    static constexpr bool kDecodesLines = false;
    using State = NoState;

    static NoState prepare(const uint8_t*) { return {}; }
};

}  // namespace kt::KT_ISA
