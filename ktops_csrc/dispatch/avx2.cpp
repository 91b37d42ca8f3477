#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx2.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "isa/simd_avx2-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow avx2_row = {
    "avx2",
    cpu::has_avx2,
    {avx2::Forward<bfloat16>::run, avx2::Backward<bfloat16>::run, avx2::peak_float32,
     avx2::peak_from_l2<avx2::Compute<bfloat16>>},
    {avx2::Forward<float16>::run, avx2::Backward<float16>::run, avx2::peak_float32,
     avx2::peak_from_l2<avx2::Compute<float16>>},
    {avx2::Forward<float>::run, avx2::Backward<float>::run, avx2::peak_float32,
     avx2::peak_from_l2<avx2::Compute<float>>},
    {forward_float64, backward_float64, avx2::peak_float32, avx2::peak_from_l2<float>},
    avx2::peak_int8,
    avx2::decode_rows,
    avx2::quantize,
};

}  // namespace kt
