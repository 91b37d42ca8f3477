#pragma once

// A weight with its scale and zero point, checked and converted to the kernels' WeightTensor.

#include "ops/checks.h"
#include "weights/format.h"

namespace kt::ops {

// The names of a weight's arguments in errors, and its shape [num_experts, rows, columns].
struct WeightNames {
    const char *weight, *scale, *zero, *format, *group_size;
    Size num_experts, rows, columns;
};

// Returns the format of this name, null for "dense".
const Format* find_format(const Checker& check, const WeightNames& names, const std::string& name);

// The dtype of a format's weight tensor, and the elements of a row of it.
ScalarType scalar_type(Element element);
Size row_size(const Checker& check, const WeightNames& names, const Format& format);
void check_group_size(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size);

// Checks a weight in a format and returns a view. The tensors must outlive it.
WeightTensor weight_argument(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size,
                             const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& zero);

}  // namespace kt::ops
