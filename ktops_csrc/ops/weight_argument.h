#pragma once

// One weight with its scale and zero point, checked and turned into what the kernels take.

#include "ops/checks.h"
#include "weights/format.h"

namespace kt::ops {

// What the arguments of a weight are called in errors, and its shape [num_experts, rows, columns].
struct WeightNames {
    const char *weight, *scale, *zero, *format, *group_size;
    Size num_experts, rows, columns;
};

// The format of this name, null for "dense".
const Format* find_format(const Checker& check, const WeightNames& names, const std::string& name);

// A weight in a format. The tensors must outlive the result.
WeightTensor weight_argument(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size,
                             const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& zero);

}  // namespace kt::ops
