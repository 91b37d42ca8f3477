// AVX-512 without BF16: Skylake-X, Cascade Lake, Ice Lake. bfloat16 is widened to float32.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "dispatch/table.h"
#include "isa/cpu_features.h"
#include "moe/routing.h"

#define KT_ISA avx512
#define KT_VECTOR_BYTES 64
#define KT_GENERIC_ROWS 6  // 6 x 4 accumulators, 4 for a step of B, 1 for the broadcast of A
#define KT_GENERIC_PANELS 4
#define KT_TRANSPOSE_16X16 transpose_16x16_avx512

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#include "isa/transpose_avx512-inl.h"

#include "formats/decode-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/peak-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx512_row = {
    "avx512",
    cpu::has_avx512,
    {avx512::Forward<bfloat16>::run, avx512::Backward<bfloat16>::run, avx512::peak_float32},
    {avx512::Forward<float>::run, avx512::Backward<float>::run, avx512::peak_float32},
    {forward_float64, backward_float64, avx512::peak_float32},
    avx512::peak_int8,
    avx512::decode_rows,
};

}  // namespace kt
