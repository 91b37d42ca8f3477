#include "dispatch/table.h"
#include "isa/cpu_features.h"

#include "dispatch/scalar.h"

#include "isa/direct_widened-inl.h"
#include "isa/narrow_generic-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "isa/simd_generic-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"
#include "quantize/quantize-inl.h"
#include "weights/decode-inl.h"

namespace kt {

void forward_float64(const Problem& problem, const ForwardResults& results) {
    scalar::Forward<double>::run(problem, results);
}
void backward_float64(const BackwardProblem& problem) { scalar::Backward<double>::run(problem); }

const IsaRow scalar_row = {
    "scalar",
    cpu::has_scalar,
    {scalar::Forward<bfloat16>::run, scalar::Backward<bfloat16>::run, scalar::peak_float32,
     scalar::peak_from_l2<scalar::Compute<bfloat16>>},
    {scalar::Forward<float16>::run, scalar::Backward<float16>::run, scalar::peak_float32,
     scalar::peak_from_l2<scalar::Compute<float16>>},
    {scalar::Forward<float>::run, scalar::Backward<float>::run, scalar::peak_float32,
     scalar::peak_from_l2<scalar::Compute<float>>},
    {forward_float64, backward_float64, scalar::peak_float32, scalar::peak_from_l2<float>},
    scalar::peak_int8,
    scalar::decode_rows,
    scalar::quantize,
};

}  // namespace kt
