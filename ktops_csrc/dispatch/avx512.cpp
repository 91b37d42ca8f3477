#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx512.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/simd_avx512-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

#include "dispatch/kernels-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx512_row = {
    "avx512",
    cpu::has_avx512,
    avx512::moe_kernels<bfloat16>(),
    avx512::moe_kernels<float16>(),
    avx512::moe_kernels<float>(),
    avx512::float64_kernels(),
    avx512::peak_int8,
    avx512::decode_rows,
    avx512::quantize,
};

}  // namespace kt
