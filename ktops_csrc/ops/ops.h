#pragma once

// The C++ implementations of all operators, in the order of schemas.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/moe_arguments.def"

// KT_MOE_ARGUMENTS(KT_PARAMETER) expands to function parameters, with KT_NAME to their names, with KT_SCHEMA to a
// schema.
#define KT_PARAMETER(schema, type, name) type name
#define KT_NAME(schema, type, name) name
#define KT_SCHEMA(schema, type, name) schema name

namespace kt::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<torch::stable::Tensor>;

Tensor moe_fwd(KT_MOE_ARGUMENTS(KT_PARAMETER));
int64_t moe_fwd_begin(KT_MOE_ARGUMENTS(KT_PARAMETER), int64_t stream);
void moe_fwd_end(int64_t call, OptionalTensor output);

int64_t prepare_moe(KT_MOE_ARGUMENTS(KT_PARAMETER));
Tensor moe_fwd_prepared(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int64_t experts);
void release_moe(int64_t experts);

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
ForwardResults moe_sft_fwd(KT_MOE_ARGUMENTS(KT_PARAMETER), std::string save);

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
Gradients moe_sft_bwd(Tensor grad_output, KT_MOE_ARGUMENTS(KT_PARAMETER), std::string save, Tensor saved_gate_up,
                      Tensor saved_xa, Tensor saved_ha, int64_t grad_mask);

Tensor dequantize(Tensor weight, OptionalTensor scale, OptionalTensor zero, std::string weight_format,
                  int64_t group_size, int64_t columns);

std::tuple<Tensor, OptionalTensor, OptionalTensor> quantize(Tensor weight, std::string weight_format,
                                                            int64_t group_size, std::string method);

std::string cpu_capability();
std::string cpu_capabilities();
std::string cpu_refusals();
void set_cpu_capability(std::string name);
double measure_peak(std::string isa, std::string dtype, int64_t iterations, bool from_l2);
int64_t sum_words(Tensor words);

void empty_cache();
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats();
void ask_for_huge_pages(Tensor tensor);

void load_cuda(std::string path);
void synchronize_streams();
void stop_streams();
void empty_stream_cache();
int64_t staged_bytes();

bool set_profiling(bool enabled);
bool profiling();
std::string profiled_steps();

void set_numa_nodes(std::vector<int64_t> node_of_cpu, std::vector<int64_t> shares);
std::vector<int64_t> numa_rows(int64_t rows);

std::string paths();
std::string force_path(std::string name);

}  // namespace kt::ops
