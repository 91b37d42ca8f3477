#pragma once

// Every dispatch/<isa>.h includes this before it opens the target region of its ISA, in which the *-inl.h files are
// compiled. Inline functions of other headers must not be compiled there: they would contain instructions of that ISA,
// and the linker may keep that copy for every caller. So this file includes all system and ktops headers that *-inl.h
// files include, except for <immintrin.h>, which only some ISAs use. Including them again inside the region does
// nothing.

#include <emmintrin.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "core/views.h"
#include "core/workspace.h"
#include "dispatch/table.h"
#include "gemm/path.h"
#include "isa/traits.h"
#include "moe/problem.h"
#include "moe/routing.h"
#include "parallel/profile.h"
#include "parallel/schedule.h"
#include "quantize/problem.h"
#include "weights/format.h"
#include "weights/format_table.h"

namespace kt::avx512_vbmi {

// Kernels for the rows with AVX-512: see Isa::use_faster_dots.
void use_faster_dots(FormatTable* tables);

}  // namespace kt::avx512_vbmi
