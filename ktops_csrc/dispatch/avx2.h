#pragma once

// AVX2 with FMA: Haswell and Zen and later. bfloat16 is widened to float32.

#include <immintrin.h>

#include "dispatch/row.h"

#define KT_ISA avx2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

namespace kt::KT_ISA {

struct Isa : IsaDefaults {
    static constexpr int kVectorBytes = 32;
    static constexpr int kGemmRows = 6;  // x 2 accumulators, 2 for a step of B, 1 for the broadcast of A: 15 of 16
    static constexpr int64_t kBFloat16DirectRows = 24;
    static constexpr int64_t kFloat16SumRows = 16;
    static constexpr int64_t kCodeDotRows = 4;
    static constexpr int64_t kInt8Rows = 32, kWordInt8Rows = kAlways;
};

}  // namespace kt::KT_ISA
