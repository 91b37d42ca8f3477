#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/avx512_vbmi.h"

#include "formats/fp8_lines-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/simd_avx512-inl.h"
#include "weights/format_kernels-inl.h"

namespace kt::avx512_vbmi {

template <Scales kScales>
void use_lines(FormatTable& table) {
    table.dots = &FormatKernels<Fp8Lines, kScales, false>::dots;
    table.split = Fp8Lines::kSplit;
}

}  // namespace kt::avx512_vbmi

#pragma GCC pop_options

namespace kt::avx512_vbmi {

void use_faster_dots(FormatTable* tables) {
    if (!cpu::has_avx512_vbmi()) return;
    use_lines<Scales::kFloats>(tables[static_cast<int>(FormatId::fp8_e4m3)]);
    use_lines<Scales::kExponents>(tables[static_cast<int>(FormatId::mxfp8)]);
}

}  // namespace kt::avx512_vbmi
