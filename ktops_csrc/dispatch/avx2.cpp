#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx2.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/simd_avx2-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

#include "dispatch/kernels-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx2_row = {
    "avx2",
    cpu::has_avx2,
    avx2::moe_kernels<bfloat16>(),
    avx2::moe_kernels<float16>(),
    avx2::moe_kernels<float>(),
    avx2::float64_kernels(),
    avx2::peak_int8,
    avx2::decode_rows,
    avx2::quantize,
};

}  // namespace kt
