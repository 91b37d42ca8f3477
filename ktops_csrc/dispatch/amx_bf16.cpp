#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/amx_bf16.h"

#include "gemm/code_tiles-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/micro_gemm_amx_bf16-inl.h"
#include "isa/narrow_avx512_bf16-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_amx_bf16-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "isa/simd_avx512-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

// Decoding uses no tiles, so the decoders of avx512_bf16 serve here too.
namespace kt::avx512_bf16 {
const FormatTable& format_table(FormatId format);
}
namespace kt::amx_bf16 {
const FormatTable& format_table(FormatId format) { return avx512_bf16::format_table(format); }
}  // namespace kt::amx_bf16

#pragma GCC pop_options

namespace kt {

// Quantizing uses no instructions beyond those of avx512.
namespace avx512 {
void quantize(const QuantizeProblem& problem);
}

const IsaRow amx_bf16_row = {
    "amx_bf16",
    cpu::has_amx_bf16,
    {amx_bf16::Forward<bfloat16>::run, amx_bf16::Backward<bfloat16>::run, amx_bf16::peak_bfloat16_tiles,
     amx_bf16::peak_from_l2<amx_bf16::Compute<bfloat16>>},
    {amx_bf16::Forward<float16>::run, amx_bf16::Backward<float16>::run, amx_bf16::peak_float32,
     amx_bf16::peak_from_l2<amx_bf16::Compute<float16>>},
    {amx_bf16::Forward<float>::run, amx_bf16::Backward<float>::run, amx_bf16::peak_float32,
     amx_bf16::peak_from_l2<amx_bf16::Compute<float>>},
    {forward_float64, backward_float64, amx_bf16::peak_float32, amx_bf16::peak_from_l2<float>},
    amx_bf16::peak_int8_tiles,
    amx_bf16::decode_rows,
    avx512::quantize,
    cpu::tiles_refused,
};

}  // namespace kt
