#pragma once

// The shared arguments of the MoE operators, checked and converted to the kernels' Problem.

#include "moe/problem.h"
#include "ops/checks.h"

namespace kt::ops {

// The tokens and their routes, checked and converted to the kernels' Problem.
struct Tokens {
    // experts: what the Problem says of the experts, if they are known already. Throws the errors of `check`.
    Tokens(const Checker& check, const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
           const Problem& experts = {});

    Problem problem;
    DType dtype;           // of hidden_states, the weights, the output and the saved tensors
    Tensor hidden_states;  // contiguous after point_to_tokens()
    Tensor topk_ids, topk_weights;

    // Completes the Problem once the experts are known.
    void point_to_tokens();

    // A new tensor in the dtype of hidden_states.
    Tensor empty_output() const;
};

struct MoeArguments : Tokens {
    // Throws the errors of the op named `op` before anything is allocated.
    MoeArguments(const char* op, KT_MOE_ARGUMENTS(KT_PARAMETER));

    Tensor gate_up_proj, down_proj;
    OptionalTensor gate_up_bias, down_bias, gate_up_lora_A, gate_up_lora_B, down_lora_A, down_lora_B;

    int64_t num_routes() const { return problem.num_tokens * problem.top_k; }

    // Columns of [g | u].
    int64_t gate_up_columns() const;

    // A new tensor in the dtype of hidden_states.
    Tensor empty(std::initializer_list<int64_t> size) const;

private:
    // The kernels' views of biases and LoRA factors.
    void point_to_tensors(const Checker& check);
};

// The path requested by kt::force_path.
std::optional<Path> forced_path();

// True if [g | u] is saved ("activations"), false if it is recomputed ("recompute").
bool keeps_activations(const char* op, const std::string& save);

}  // namespace kt::ops
