#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx512_bf16.h"

#include "isa/direct_avx512_bf16-inl.h"
#include "isa/micro_gemm_avx512_bf16-inl.h"
#include "isa/narrow_avx512_bf16-inl.h"
#include "isa/peak_avx512_bf16-inl.h"
#include "isa/simd_avx512-inl.h"
#include "weights/decode-inl.h"

#include "dispatch/kernels-inl.h"

#pragma GCC pop_options

namespace kt {

// Quantizing uses no instructions beyond those of avx512.
namespace avx512 {
void quantize(const QuantizeProblem& problem);
}

const IsaRow avx512_bf16_row = {
    "avx512_bf16",
    cpu::has_avx512_bf16,
    avx512_bf16::moe_kernels<bfloat16>(avx512_bf16::peak_bfloat16_dot),
    avx512_bf16::moe_kernels<float16>(),
    avx512_bf16::moe_kernels<float>(),
    avx512_bf16::float64_kernels(),
    avx512_bf16::peak_int8,
    avx512_bf16::decode_rows,
    avx512::quantize,
};

}  // namespace kt
