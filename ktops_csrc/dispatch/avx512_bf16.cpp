#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx512_bf16.h"

#include "isa/direct_avx512_bf16-inl.h"
#include "isa/micro_gemm_avx512_bf16-inl.h"
#include "isa/narrow_avx512_bf16-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_avx512_bf16-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "isa/simd_avx512-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"
#include "weights/decode-inl.h"

#pragma GCC pop_options

namespace kt {

// Quantizing uses no instructions beyond those of avx512.
namespace avx512 {
void quantize(const QuantizeProblem& problem);
}

const IsaRow avx512_bf16_row = {
    "avx512_bf16",
    cpu::has_avx512_bf16,
    {avx512_bf16::Forward<bfloat16>::run, avx512_bf16::Backward<bfloat16>::run, avx512_bf16::peak_bfloat16_dot,
     avx512_bf16::peak_from_l2<avx512_bf16::Compute<bfloat16>>},
    {avx512_bf16::Forward<float16>::run, avx512_bf16::Backward<float16>::run, avx512_bf16::peak_float32,
     avx512_bf16::peak_from_l2<avx512_bf16::Compute<float16>>},
    {avx512_bf16::Forward<float>::run, avx512_bf16::Backward<float>::run, avx512_bf16::peak_float32,
     avx512_bf16::peak_from_l2<avx512_bf16::Compute<float>>},
    {forward_float64, backward_float64, avx512_bf16::peak_float32, avx512_bf16::peak_from_l2<float>},
    avx512_bf16::peak_int8,
    avx512_bf16::decode_rows,
    avx512::quantize,
};

}  // namespace kt
