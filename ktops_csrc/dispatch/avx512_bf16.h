#pragma once

// AVX-512 with VDPBF16PS and VPDPBUSD: Cooper Lake, Sapphire Rapids and later, Zen 4 and later.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "dispatch/row.h"

#define KT_ISA avx512_bf16

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")

namespace kt::KT_ISA {

struct Isa : IsaDefaults {
    static constexpr int kVectorBytes = 64;
    static constexpr int kGemmRows = 6, kGemmPanels = 4;
    static constexpr bool kBFloat16Dot = true, kByteDot = true;
    static constexpr int64_t kDotOnlyRows = 12, kMostLeftOver = 6;
    static constexpr int64_t kSumOnlyRows = 12, kDecodedSumRows = 16;
    static constexpr int kCodeGemmRows = 3, kCodeGemmPanels = 4;
    static constexpr int64_t kInt8Rows = kAlways, kWordInt8Rows = kAlways;
    static void use_faster_dots(FormatTable* tables) { avx512_vbmi::use_faster_dots(tables); }
};

}  // namespace kt::KT_ISA
