#pragma once

// Any x86-64: the compiler's vector extension on SSE2.

#include "dispatch/row.h"

#define KT_ISA scalar

namespace kt::KT_ISA {

struct Isa : IsaDefaults {
    static constexpr int64_t kFloat16DotRows = 2, kFloat16SumRows = 3;  // SSE2 widens float16 slowly
};

}  // namespace kt::KT_ISA
