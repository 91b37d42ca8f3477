#pragma once

// What a row of kernels includes first. dispatch/<isa>.h opens the target region of its row, and *-inl.h files, which
// are compiled once for each row, come after that. Inline functions of other headers must not be compiled there: they
// would hold the row's instructions, and the linker may keep that copy for everybody. So all headers that *-inl.h files
// include, of the system and of ktops, are here, except for <immintrin.h>, which only some rows have. Including them
// again does nothing.

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
#include "gemm/path.h"
#include "isa/traits.h"
#include "moe/problem.h"
#include "moe/routing.h"
#include "parallel/profile.h"
#include "parallel/schedule.h"
#include "weights/format.h"
#include "weights/format_table.h"
