// Any x86-64: the compiler's vector extension on SSE2, and float64 for every row.

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "dispatch/table.h"
#include "isa/cpu_features.h"
#include "moe/routing.h"

#define KT_ISA scalar
#define KT_VECTOR_BYTES 16
#define KT_GENERIC_ROWS 2
#define KT_GENERIC_PANELS 1

#include "formats/decode-inl.h"
#include "isa/direct_widened-inl.h"
#include "isa/peak-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

namespace kt {

void forward_float64(const Problem& problem, const ForwardResults& results) {
    scalar::Forward<double>::run(problem, results);
}
void backward_float64(const BackwardProblem& problem) { scalar::Backward<double>::run(problem); }

const IsaRow scalar_row = {
    "scalar",
    cpu::has_x86_64,
    {scalar::Forward<bfloat16>::run, scalar::Backward<bfloat16>::run, scalar::peak_float32},
    {scalar::Forward<float>::run, scalar::Backward<float>::run, scalar::peak_float32},
    {forward_float64, backward_float64, scalar::peak_float32},
    scalar::peak_int8,
    scalar::decode_rows,
};

}  // namespace kt
