#pragma once

// A decoder is a type with
//   kBlock, kBytes                   weights that are decoded from so many bytes: 32, or the format's own block
//   kSplit                           the order of a chunk (isa/chunk-inl.h)
//   kFactor                          by which values are to be multiplied, besides their scale
//   State prepare(block)             what all chunks of a block need
//   decode(block, state, part, v)    chunk number `part` of a block
// and is named in formats.def.
//
// That of an integer format, whose codes are multiplied (weights/codes-inl.h), also has
//   kCodeColumns, kCodeStep   a unit: columns whose codes are read together, and its bytes
//   kPairs                    whether a byte holds two columns: then the codes of a unit are those of even columns and
//                             then those of odd columns, else in order
//   codes(unit, out)          these codes, vector by vector
//   kCodesAByte               codes that each byte holds by itself, at the same place in kCodesAByte parts of the unit:
//                             then codes_of(bytes, out) gives them, a vector of each part; or 0
//   kCodeGroup                columns that share a scale that lies in the unit, or 0: scales are beside the weight
//   code_scales(unit, out)    the scales in a unit, followed by s z if kMins; zeros up to 16 numbers
//   kMins, kZeroCode          whether groups in a unit have a zero point of their own; z where they have none

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
