#pragma once

// AVX-512 without BF16: Skylake-X, Cascade Lake, Ice Lake. bfloat16 is widened to float32.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "dispatch/row.h"

#define KT_ISA avx512

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace kt::KT_ISA {

struct Isa : IsaDefaults {
    static constexpr int kVectorBytes = 64;
    static constexpr int kGemmRows = 6, kGemmPanels = 4;  // accumulators; 4 for a step of B, 1 for the broadcast of A
    static constexpr int kCodeGemmRows = 4, kCodeGemmPanels = 2;
    static constexpr int64_t kInt8Rows = 32, kWordInt8Rows = kAlways;
    static void use_faster_dots(FormatTable* tables) { avx512_vbmi::use_faster_dots(tables); }
};

}  // namespace kt::KT_ISA
