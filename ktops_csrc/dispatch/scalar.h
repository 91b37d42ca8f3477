#pragma once

// Any x86-64: the compiler's vector extension on SSE2.

#include "dispatch/row.h"

#define KT_ISA scalar

namespace kt::KT_ISA {

struct Isa : IsaDefaults {};

}  // namespace kt::KT_ISA
