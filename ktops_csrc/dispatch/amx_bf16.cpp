#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/amx_bf16.h"

#include "gemm/code_tiles-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/micro_gemm_amx_bf16-inl.h"
#include "isa/narrow_avx512_bf16-inl.h"
#include "isa/peak_amx_bf16-inl.h"
#include "isa/simd_avx512-inl.h"

#include "dispatch/kernels-inl.h"

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
    amx_bf16::moe_kernels<bfloat16>(amx_bf16::peak_bfloat16_tiles),
    amx_bf16::moe_kernels<float16>(),
    amx_bf16::moe_kernels<float>(),
    amx_bf16::float64_kernels(),
    amx_bf16::peak_int8_tiles,
    amx_bf16::decode_rows,
    avx512::quantize,
    cpu::tiles_refused,
};

}  // namespace kt
