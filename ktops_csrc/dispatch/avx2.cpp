// AVX2 with FMA: Haswell and Zen and later. bfloat16 is widened to float32.

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

#define KT_ISA avx2
#define KT_VECTOR_BYTES 32
#define KT_GENERIC_ROWS 6  // 6 x 2 accumulators, 2 for a step of B, 1 for the broadcast of A: 15 of 16 registers
#define KT_GENERIC_PANELS 1
#define KT_BFLOAT16_DIRECT_ROWS 12
#define KT_TRANSPOSE_16X16 transpose_16x16_avx2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

#include "isa/transpose_avx2-inl.h"

#include "formats/decode-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/peak-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx2_row = {
    "avx2",
    cpu::has_avx2,
    {avx2::Forward<bfloat16>::run, avx2::Backward<bfloat16>::run, avx2::peak_float32},
    {avx2::Forward<float>::run, avx2::Backward<float>::run, avx2::peak_float32},
    {forward_float64, backward_float64, avx2::peak_float32},
    avx2::peak_int8,
    avx2::decode_rows,
};

}  // namespace kt
