#pragma once

// The shared arguments of the MoE operators, checked and converted to the kernels' Problem.

#include "moe/problem.h"
#include "ops/checks.h"

namespace kt::ops {

struct MoeArguments {
    // Throws the errors of the op named `op` before anything is allocated.
    MoeArguments(const char* op, KT_MOE_ARGUMENTS(KT_PARAMETER));

    Problem problem;
    DType dtype;           // of hidden_states, the weights, the output and the saved tensors
    Tensor hidden_states;  // contiguous
    Tensor topk_ids, topk_weights, gate_up_proj, down_proj;
    OptionalTensor gate_up_bias, down_bias, gate_up_lora_A, gate_up_lora_B, down_lora_A, down_lora_B;

    int64_t num_routes() const { return problem.num_tokens * problem.top_k; }

    // Columns of [g | u].
    int64_t gate_up_columns() const;

    // New tensors of the dtype of hidden_states.
    Tensor empty_output() const;
    Tensor empty(std::initializer_list<int64_t> size) const;

private:
    // The kernels' views of all tensors but the weights.
    void point_to_tensors(const Checker& check, DType weights_dtype);
};

// The path requested by kt::force_path.
std::optional<Path> forced_path();

// True if [g | u] is saved ("activations"), false if it is recomputed ("recompute").
bool keeps_activations(const char* op, const std::string& save);

}  // namespace kt::ops
