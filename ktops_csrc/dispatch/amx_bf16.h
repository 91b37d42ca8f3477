#pragma once

// AMX tiles for bfloat16 and bytes, AVX-512 with BF16 for the rest: Sapphire Rapids and later.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "dispatch/row.h"

#define KT_ISA amx_bf16

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")

namespace kt::KT_ISA {

struct TileRegion;

struct Isa : IsaDefaults {
    static constexpr int kVectorBytes = 64;
    static constexpr int kGemmRows = 6, kGemmPanels = 4;
    static constexpr bool kBFloat16Dot = true, kByteDot = true;
    static constexpr int64_t kBFloat16KMultiple = 32;  // a tile
    static constexpr int64_t kBFloat16DirectRows = 12, kDotOnlyRows = 4;
    static constexpr int64_t kSumOnlyRows = 12, kDecodedSumRows = 12;
    static constexpr int kCodeGemmRows = 3, kCodeGemmPanels = 4;
    static constexpr bool kInt8Tiles = true;
    static constexpr int64_t kInt8Rows = 8, kWordInt8Rows = 8, kInt8Group = 1024;  // else tiles of bfloat16 are faster
    using Region = TileRegion;
};

}  // namespace kt::KT_ISA
