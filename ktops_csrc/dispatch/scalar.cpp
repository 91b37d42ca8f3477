#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/scalar.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/simd_generic-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

#include "dispatch/kernels-inl.h"

namespace kt {

void forward_float64(const Problem& problem, const ForwardResults& results) {
    scalar::Forward<double>::run(problem, results);
}
void backward_float64(const BackwardProblem& problem) { scalar::Backward<double>::run(problem); }

const IsaRow scalar_row = {
    "scalar",
    cpu::has_scalar,
    scalar::moe_kernels<bfloat16>(),
    scalar::moe_kernels<float16>(),
    scalar::moe_kernels<float>(),
    scalar::float64_kernels(),
    scalar::peak_int8,
    scalar::decode_rows,
    scalar::quantize,
};

}  // namespace kt
