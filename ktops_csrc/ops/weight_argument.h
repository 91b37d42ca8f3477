#pragma once

// One weight with its scale and zero point, checked and turned into what the kernels take.

#include "ops/checks.h"
#include "weights/format.h"

namespace kt::ops {

// The formats of gate_up_proj and down_proj in "a" or "a,b"; null for dense.
struct WeightFormats {
    const Format *gate_up, *down;
    WeightFormats(const Checker& check, const std::string& weight_format);
};

// The format of this name, null for "dense".
const Format* find_format(const Checker& check, const char* argument, const std::string& name);

// What a weight is called in errors, and its shape [num_experts, rows, columns].
struct WeightNames {
    const char *weight, *scale, *zero;
    Size num_experts, rows, columns;
};

// A weight in a format. The tensors must outlive the result.
WeightTensor weight_argument(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size,
                             const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& zero);

}  // namespace kt::ops
