// AMX tiles for bfloat16, AVX-512 with BF16 for the rest: Sapphire Rapids and later.

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined: bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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

#define KT_ISA amx_bf16
#define KT_VECTOR_BYTES 64
#define KT_GENERIC_ROWS 6
#define KT_GENERIC_PANELS 4
#define KT_FORMATS_OF avx512_bf16
#define KT_BFLOAT16_DOT
#define KT_INT8_DOT
#define KT_INT8_TILES
#define KT_CODE_ROWS 8
#define KT_CODE_GROUP 1024
#define KT_BFLOAT16_K_MULTIPLE 32
#define KT_BFLOAT16_DIRECT_ROWS 12
#define KT_TRANSPOSE_16X16 transpose_16x16_avx512

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")

#include "isa/transpose_avx512-inl.h"

#include "isa/micro_gemm_amx_bf16-inl.h"
#include "isa/peak_amx_bf16-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

#pragma GCC pop_options

namespace kt {

const IsaRow amx_bf16_row = {
    "amx_bf16",
    cpu::has_amx_bf16,
    {amx_bf16::Forward<bfloat16>::run, amx_bf16::Backward<bfloat16>::run, amx_bf16::peak_bfloat16_tiles},
    {amx_bf16::Forward<float>::run, amx_bf16::Backward<float>::run, amx_bf16::peak_float32},
    {forward_float64, backward_float64, amx_bf16::peak_float32},
    amx_bf16::peak_int8_tiles,
    amx_bf16::decode_rows,
    cpu::tiles_refused,
};

}  // namespace kt
