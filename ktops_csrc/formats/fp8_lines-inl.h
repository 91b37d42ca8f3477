#pragma once

// fp8_e4m3 and mxfp8, two chunks at a time.

#include <cstdint>

#include "formats/decoder-inl.h"
#include "isa/fp8_avx512_vbmi-inl.h"

namespace kt::KT_ISA {

struct Fp8Lines : ChunkDecoder {
    static constexpr int64_t kBytes = kChunk;
    static constexpr bool kSplit = true, kDecodesLines = true;

    static void decode(const uint8_t* block, NoState, int64_t, VecF* v) { unpack_fp8_exactly<1>(block, v); }
    static void decode_line(const uint8_t* blocks, VecF* v) { unpack_fp8_exactly<2>(blocks, v); }
};

}  // namespace kt::KT_ISA
