// The kt operators: the whole API in one file.
//
// The arguments that the MoE operators share are in moe_arguments.def. T tokens, H hidden_size, I intermediate_size, r
// LoRA rank, R = T*K routes. save is "activations" or "recompute".

#include <Python.h>

#include "ops/ops.h"

#define KT_TEXT(...) #__VA_ARGS__
#define KT_EXPANDED_TEXT(...) KT_TEXT(__VA_ARGS__)
#define KT_MOE_SCHEMA KT_EXPANDED_TEXT(KT_MOE_ARGUMENTS(KT_SCHEMA))

// clang-format off
STABLE_TORCH_LIBRARY(kt, m) {
    // -> [T, H]
    m.def("moe_fwd(" KT_MOE_SCHEMA ") -> Tensor");
    // the same in two halves, in the order of a CUDA stream (its address), without waiting for either: hidden_states,
    // topk_ids and topk_weights are contiguous and on the device, and so is output; None: the result is not needed
    m.def("moe_fwd_begin(" KT_MOE_SCHEMA ", int stream) -> int call");
    m.def("moe_fwd_end(int call, Tensor(a!)? output) -> ()");

    // the same for experts whose arguments are checked once, and held until they are released; the tokens given to
    // prepare_moe are only checked
    m.def("prepare_moe(" KT_MOE_SCHEMA ") -> int experts");
    m.def("moe_fwd_prepared(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts) -> Tensor");
    m.def("release_moe(int experts) -> ()");

    // -> output [T, H]; saved tensors, one row per position: gate_up [R, 2I] (or [0, 2I] for "recompute"),
    //    x A1^T [R, r1], h A2^T [R, r2]; copies in CPU memory of what was on another device, None on the CPU
    m.def("moe_sft_fwd(" KT_MOE_SCHEMA ", str save) -> (Tensor output, Tensor saved_gate_up, "
          "Tensor saved_xa, Tensor saved_ha, Tensor? host_hidden_states, Tensor? host_topk_ids, "
          "Tensor? host_topk_weights)");

    // bit i of grad_mask requests result i
    m.def("moe_sft_bwd(Tensor grad_output, " KT_MOE_SCHEMA ", str save, Tensor saved_gate_up, "
          "Tensor saved_xa, Tensor saved_ha, int grad_mask) -> ("
          "Tensor? grad_hidden_states, Tensor? grad_topk_weights, Tensor? grad_gate_up_proj, Tensor? grad_down_proj, "
          "Tensor? grad_gate_up_bias, Tensor? grad_down_bias, Tensor? grad_gate_up_lora_A, "
          "Tensor? grad_gate_up_lora_B, Tensor? grad_down_lora_A, Tensor? grad_down_lora_B)");

    // weights [E, N, ...] in a format -> float32 [E, N, columns]
    m.def("dequantize(Tensor weight, Tensor? scale, Tensor? zero, str weight_format, int group_size, int columns) "
          "-> Tensor");

    // weights [E, N, K] -> their codes [E, N, ...], scales and zero points in a format; method is "rtn", "mse" or "hqq"
    m.def("quantize(Tensor weight, str weight_format, int group_size, str method) -> "
          "(Tensor weight, Tensor? scale, Tensor? zero)");

    // the ISA whose kernels are in use; "name=0|1,..." for every compiled ISA, 1 if this CPU can run it; choose an ISA
    m.def("cpu_capability() -> str");
    m.def("cpu_capabilities() -> str");
    // "name: reason" for better ISAs that the CPU supports but the operating system forbids; "" with KTOPS_ISA
    m.def("cpu_refusals() -> str");
    m.def("set_cpu_capability(str name) -> ()");

    // FLOP/s of one thread that executes only the ISA's multiply-add instruction for dtype ("bfloat16", "float32" or
    // "int8"); or, if from_l2, that multiplies matrices of "bfloat16" or "float32" in its L2 cache
    m.def("measure_peak(str isa, str dtype, int iterations, bool from_l2=False) -> float");
    // the sum of an int64 tensor [N] modulo 2^64, computed by one thread at its peak memory bandwidth
    m.def("sum_words(Tensor words) -> int");

    // scratch memory kept between calls: release it; report it. Ask the system for the huge pages that lie within a
    // tensor whose memory has not been used yet
    m.def("empty_cache() -> ()");
    m.def("memory_stats() -> (int bytes_in_use, int bytes_idle, int bytes_peak, int blocks, int allocations)");
    m.def("ask_for_huge_pages(Tensor tensor) -> ()");

    // calls in the order of streams: the CUDA runtime to use, "" for the one in this process; wait for all of them; let
    // them pass without being computed, when Python exits; release their pinned memory; the bytes of it
    m.def("load_cuda(str path) -> ()");
    m.def("synchronize_streams() -> ()");
    m.def("stop_streams() -> ()");
    m.def("empty_stream_cache() -> ()");
    m.def("staged_bytes() -> int");

    // turn profiling of every step on or off (returns the previous setting); "operator step calls tasks busy wait wall
    // at_home stolen\n" for every step so far, times in nanoseconds, with " path=blocks" before the newline for each
    // path taken
    m.def("set_profiling(bool enabled) -> bool");
    m.def("profiling() -> bool");
    m.def("profiled_steps() -> str");

    // the NUMA nodes over which the rows of weights are spread: for every CPU, the node whose tasks its threads take
    // first, and the shares of the nodes; the first row of each node's part of so many rows, then that number
    m.def("set_numa_nodes(int[] node_of_cpu, int[] shares) -> ()");
    m.def("numa_rows(int rows) -> int[]");

    // for tests: the paths of products, "name,..."; force a path wherever it is possible, "" for none (returns the
    // previous one)
    m.def("paths() -> str");
    m.def("force_path(str name) -> str");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(kt, CPU, m) {
    m.impl("moe_fwd", TORCH_BOX(&kt::ops::moe_fwd));
    m.impl("prepare_moe", TORCH_BOX(&kt::ops::prepare_moe));
    m.impl("moe_fwd_prepared", TORCH_BOX(&kt::ops::moe_fwd_prepared));
    m.impl("moe_sft_fwd", TORCH_BOX(&kt::ops::moe_sft_fwd));
    m.impl("moe_sft_bwd", TORCH_BOX(&kt::ops::moe_sft_bwd));
    m.impl("dequantize", TORCH_BOX(&kt::ops::dequantize));
    m.impl("quantize", TORCH_BOX(&kt::ops::quantize));
    m.impl("sum_words", TORCH_BOX(&kt::ops::sum_words));
    m.impl("ask_for_huge_pages", TORCH_BOX(&kt::ops::ask_for_huge_pages));
}

STABLE_TORCH_LIBRARY_IMPL(kt, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&kt::ops::cpu_capability));
    m.impl("cpu_capabilities", TORCH_BOX(&kt::ops::cpu_capabilities));
    m.impl("cpu_refusals", TORCH_BOX(&kt::ops::cpu_refusals));
    m.impl("set_cpu_capability", TORCH_BOX(&kt::ops::set_cpu_capability));
    m.impl("measure_peak", TORCH_BOX(&kt::ops::measure_peak));
    m.impl("empty_cache", TORCH_BOX(&kt::ops::empty_cache));
    m.impl("memory_stats", TORCH_BOX(&kt::ops::memory_stats));
    m.impl("moe_fwd_begin", TORCH_BOX(&kt::ops::moe_fwd_begin));
    m.impl("moe_fwd_end", TORCH_BOX(&kt::ops::moe_fwd_end));
    m.impl("release_moe", TORCH_BOX(&kt::ops::release_moe));
    m.impl("load_cuda", TORCH_BOX(&kt::ops::load_cuda));
    m.impl("synchronize_streams", TORCH_BOX(&kt::ops::synchronize_streams));
    m.impl("stop_streams", TORCH_BOX(&kt::ops::stop_streams));
    m.impl("empty_stream_cache", TORCH_BOX(&kt::ops::empty_stream_cache));
    m.impl("staged_bytes", TORCH_BOX(&kt::ops::staged_bytes));
    m.impl("set_profiling", TORCH_BOX(&kt::ops::set_profiling));
    m.impl("profiling", TORCH_BOX(&kt::ops::profiling));
    m.impl("profiled_steps", TORCH_BOX(&kt::ops::profiled_steps));
    m.impl("set_numa_nodes", TORCH_BOX(&kt::ops::set_numa_nodes));
    m.impl("numa_rows", TORCH_BOX(&kt::ops::numa_rows));
    m.impl("paths", TORCH_BOX(&kt::ops::paths));
    m.impl("force_path", TORCH_BOX(&kt::ops::force_path));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
