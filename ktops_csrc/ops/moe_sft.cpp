#include "dispatch/table.h"
#include "ops/moe_arguments.h"

namespace kt::ops {

ForwardResults moe_sft_fwd(KT_MOE_ARGUMENTS(KT_PARAMETER), std::string save) {
    const char* op = "kt::moe_sft_fwd";
    const profile::Call call("moe_sft_fwd");
    const bool keep = keeps_activations(op, save);
    const MoeArguments arguments(op, KT_MOE_ARGUMENTS(KT_NAME));
    const Problem& p = arguments.problem;
    const int64_t R = arguments.num_routes();

    Tensor output = arguments.empty_output();
    Tensor saved_gate_up = arguments.empty({keep ? R : 0, arguments.gate_up_columns()});
    Tensor saved_xa = arguments.empty({R, p.gate_up_rank});
    Tensor saved_ha = arguments.empty({R, p.down_rank});
    profile::mark("arguments");
    dispatch::current()
        .kernels(arguments.dtype)
        .forward(p, {output.mutable_data_ptr(), keep ? saved_gate_up.mutable_data_ptr() : nullptr,
                     saved_xa.mutable_data_ptr(), saved_ha.mutable_data_ptr()});
    return {output, saved_gate_up, saved_xa, saved_ha, std::nullopt, std::nullopt, std::nullopt};
}

namespace {

// Allocates a tensor like `like` and returns the kernels' view, [1, rows, columns] or [E, rows, columns]. The tensor is
// contiguous, or its transpose is.
Result make_result(const Checker& check, const char* name, const Tensor& like, bool transposed, OptionalTensor& out) {
    const Tensor stored = transposed ? torch::stable::transpose(like, 1, 2) : like;
    const Tensor data = empty(stored.sizes(), like.scalar_type());
    out = transposed ? torch::stable::transpose(data, 1, 2) : data;
    Result result;
    result.data = data.mutable_data_ptr();
    result.dtype = check.floating(name, like);
    for (int64_t i = 0, skip = 3 - like.dim(); i < like.dim(); ++i) result.size[skip + i] = data.size(i);
    result.is_transposed = transposed;
    return result;
}

}  // namespace

Gradients moe_sft_bwd(Tensor grad_output, KT_MOE_ARGUMENTS(KT_PARAMETER), std::string save, Tensor saved_gate_up,
                      Tensor saved_xa, Tensor saved_ha, int64_t grad_mask) {
    const char* op = "kt::moe_sft_bwd";
    const profile::Call call("moe_sft_bwd");
    const Checker check(op);
    const bool keep = keeps_activations(op, save);
    const MoeArguments arguments(op, KT_MOE_ARGUMENTS(KT_NAME));
    const Problem& p = arguments.problem;
    const int64_t R = arguments.num_routes();

    const Size T{"num_tokens", p.num_tokens}, K{"top_k", p.top_k}, H{"hidden_size", p.hidden_size};
    p.reduce ? check.shape("grad_output", grad_output, {T, H}) : check.shape("grad_output", grad_output, {T, K, H});
    const Size routes{"num_tokens*top_k", R};
    check.shape("saved_gate_up", saved_gate_up,
                {keep ? routes : Size{"0", 0}, {"columns", arguments.gate_up_columns()}});
    check.shape("saved_xa", saved_xa, {routes, {"rank", p.gate_up_rank}});
    check.shape("saved_ha", saved_ha, {routes, {"rank", p.down_rank}});
    check.same_dtype("grad_output", grad_output, "hidden_states", arguments.dtype);
    check.same_dtype("saved_gate_up", saved_gate_up, "hidden_states", arguments.dtype);
    check.same_dtype("saved_xa", saved_xa, "hidden_states", arguments.dtype);
    check.same_dtype("saved_ha", saved_ha, "hidden_states", arguments.dtype);
    check.require(grad_mask >= 0 && grad_mask < 1 << 10, "grad_mask must be in [0, 1024), got ", grad_mask);

    grad_output = as_contiguous(grad_output);
    saved_gate_up = as_contiguous(saved_gate_up);
    saved_xa = as_contiguous(saved_xa);
    saved_ha = as_contiguous(saved_ha);
    BackwardProblem b;
    b.forward = p;
    b.grad_output = grad_output.const_data_ptr();
    b.saved_gate_up = keep ? saved_gate_up.const_data_ptr() : nullptr;
    b.saved_xa = saved_xa.const_data_ptr();
    b.saved_ha = saved_ha.const_data_ptr();

    OptionalTensor out[10];
    const struct {
        const char* name;
        OptionalTensor like;
        Result& result;
    } wanted[10] = {
        {"hidden_states", arguments.hidden_states, b.grad_hidden_states},
        {"topk_weights", topk_weights, b.grad_topk_weights},
        {"gate_up_proj", gate_up_proj, b.grad_gate_up_proj},
        {"down_proj", down_proj, b.grad_down_proj},
        {"gate_up_bias", gate_up_bias, b.grad_gate_up_bias},
        {"down_bias", down_bias, b.grad_down_bias},
        {"gate_up_lora_A", gate_up_lora_A, b.grad_gate_up_lora_A},
        {"gate_up_lora_B", gate_up_lora_B, b.grad_gate_up_lora_B},
        {"down_lora_A", down_lora_A, b.grad_down_lora_A},
        {"down_lora_B", down_lora_B, b.grad_down_lora_B},
    };
    for (int i = 0; i < 10; ++i) {
        if (!(grad_mask >> i & 1)) continue;
        check.require(wanted[i].like.has_value(), "grad_mask must not ask for the gradient of ", wanted[i].name,
                      ", which is None, got ", grad_mask);
        check.require(i != 2 || p.gate_up_proj.is_dense(), "grad_mask must not ask for the gradient of gate_up_proj, ",
                      "whose gate_up_format is not dense, got ", grad_mask);
        check.require(i != 3 || p.down_proj.is_dense(), "grad_mask must not ask for the gradient of down_proj, ",
                      "whose down_format is not dense, got ", grad_mask);
        const bool transposed =
            (i == 2 && p.gate_up_proj.dense.is_transposed()) || (i == 3 && p.down_proj.dense.is_transposed());
        wanted[i].result = make_result(check, wanted[i].name, *wanted[i].like, transposed, out[i]);
    }
    profile::mark("arguments");
    dispatch::current().kernels(arguments.dtype).backward(b);
    return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], out[9]};
}

}  // namespace kt::ops
