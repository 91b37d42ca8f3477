#pragma once

// The C++ side of every operator, in the order of schemas.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The arguments shared by the MoE operators (schemas.cpp), and their names alone.
#define KT_MOE_PARAMETERS                                                                                             \
    Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj,                \
        OptionalTensor gate_up_scale, OptionalTensor gate_up_zero, OptionalTensor down_scale,                         \
        OptionalTensor down_zero, OptionalTensor gate_up_bias, OptionalTensor down_bias,                              \
        OptionalTensor gate_up_lora_A, OptionalTensor gate_up_lora_B, OptionalTensor down_lora_A,                     \
        OptionalTensor down_lora_B, int64_t num_experts, int64_t intermediate_size, std::string weight_format,        \
        int64_t group_size, std::string compute, double gate_up_scaling, double down_scaling, std::string activation, \
        std::vector<double> activation_args
#define KT_MOE_NAMES                                                                                               \
    hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_scale, gate_up_zero, down_scale,       \
        down_zero, gate_up_bias, down_bias, gate_up_lora_A, gate_up_lora_B, down_lora_A, down_lora_B, num_experts, \
        intermediate_size, weight_format, group_size, compute, gate_up_scaling, down_scaling, activation,          \
        activation_args

namespace kt::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<torch::stable::Tensor>;

Tensor moe_fwd(KT_MOE_PARAMETERS);

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sft_fwd(KT_MOE_PARAMETERS, std::string save);

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
Gradients moe_sft_bwd(Tensor grad_output, KT_MOE_PARAMETERS, std::string save, Tensor saved_gate_up,
                      Tensor saved_gate_up_xa, Tensor saved_down_ha, int64_t grad_mask);

Tensor dequantize(Tensor weight, OptionalTensor scale, OptionalTensor zero, std::string weight_format,
                  int64_t group_size, int64_t columns);

std::string cpu_capability();
std::string cpu_capabilities();
std::string cpu_refusals();
void set_cpu_capability(std::string name);
double measure_peak(std::string isa, std::string dtype, int64_t iterations);
int64_t sum_words(Tensor words);

void empty_cache();
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats();

bool set_profiling(bool enabled);
bool profiling();
std::string profiled_steps();

std::string paths();
std::string force_path(std::string name);

}  // namespace kt::ops
