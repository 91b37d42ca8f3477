#pragma once

// AVX-512 with VBMI, which looks bytes up in tables of 128: Ice Lake and later, Zen 4 and later. Not a row of the table
// of ISAs: kernels of a few formats for the rows with AVX-512.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "dispatch/row.h"

#define KT_ISA avx512_vbmi

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")

namespace kt::KT_ISA {

struct Isa : IsaDefaults {
    static constexpr int kVectorBytes = 64;
};

}  // namespace kt::KT_ISA
