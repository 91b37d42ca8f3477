#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx512.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "isa/simd_avx512-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx512_row = {
    "avx512",
    cpu::has_avx512,
    {avx512::Forward<bfloat16>::run, avx512::Backward<bfloat16>::run, avx512::peak_float32,
     avx512::peak_from_l2<avx512::Compute<bfloat16>>},
    {avx512::Forward<float16>::run, avx512::Backward<float16>::run, avx512::peak_float32,
     avx512::peak_from_l2<avx512::Compute<float16>>},
    {avx512::Forward<float>::run, avx512::Backward<float>::run, avx512::peak_float32,
     avx512::peak_from_l2<avx512::Compute<float>>},
    {forward_float64, backward_float64, avx512::peak_float32, avx512::peak_from_l2<float>},
    avx512::peak_int8,
    avx512::decode_rows,
    avx512::quantize,
};

}  // namespace kt
