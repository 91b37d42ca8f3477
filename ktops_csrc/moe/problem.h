#pragma once

// The arguments of one MoE layer for the kernels: pointers and sizes, already checked.

#include <cstdint>

#include "gemm/path.h"
#include "parallel/schedule.h"
#include "weights/format.h"

namespace kt {

enum class Activation {
#define KT_ACTIVATION(name, Type, ...) k##Type,
#include "moe/activations.def"
#undef KT_ACTIVATION
};
enum class ActivationKind { kOfGate, kOfBoth };
constexpr int kMaxActivationArgs = 4;

// The rows of gate_up_proj: gate rows, then up rows; gate and up alternating; or no gate, [E, I, H].
enum class Gating { kConcatenated, kInterleaved, kNone };

struct Problem {
    int64_t num_tokens, top_k, num_experts, hidden_size, intermediate_size;
    int64_t gate_up_rank = 0, down_rank = 0;

    const void* hidden_states;  // [T, H], contiguous
    const void* topk_ids;       // [T, K]
    bool ids_are_int64;
    int64_t ids_stride[2];
    StridedTensor topk_weights;                    // [T, K]
    WeightTensor gate_up_proj, down_proj;          // [E, 2I, H], [E, H, I]; without a gate, I in place of 2I
    StridedTensor gate_up_bias, down_bias;         // [E, 2I], [E, H]
    StridedTensor gate_up_lora_A, gate_up_lora_B;  // [E, r1, H], [E, 2I, r1]
    StridedTensor down_lora_A, down_lora_B;        // [E, r2, I], [E, H, r2]
    double gate_up_scaling, down_scaling;
    Activation activation;
    double activation_args[kMaxActivationArgs];
    Gating gating = Gating::kConcatenated;
    bool reduce = true;  // output[t] = the weighted sum of a token's routes; else every route's own row
    Computation compute = Computation::kAuto;
    bool inference = false;           // no gradient will be requested
    std::optional<Path> forced_path;  // requested by a test

    int num_threads;
    Launch launch;

    int64_t id(int64_t t, int64_t j) const {
        const int64_t offset = t * ids_stride[0] + j * ids_stride[1];
        return ids_are_int64 ? read(static_cast<const int64_t*>(topk_ids) + offset)
                             : read(static_cast<const int32_t*>(topk_ids) + offset);
    }
};

// Contiguous, in the dtype of hidden_states. The saved tensors have one row per position and may be null.
struct ForwardResults {
    void* output;         // [T, H], or [T, K, H] without reduce
    void* saved_gate_up;  // [T*K, 2I], columns in the order of gate_up_proj's rows
    void* saved_xa;       // [T*K, r1]
    void* saved_ha;       // [T*K, r2]
};

struct BackwardProblem {
    Problem forward;
    const void* grad_output;    // [T, H], or [T, K, H] without reduce
    const void* saved_gate_up;  // null: recompute it
    const void* saved_xa;
    const void* saved_ha;

    Result grad_hidden_states, grad_topk_weights, grad_gate_up_proj, grad_down_proj, grad_gate_up_bias, grad_down_bias;
    Result grad_gate_up_lora_A, grad_gate_up_lora_B, grad_down_lora_A, grad_down_lora_B;
};

}  // namespace kt
