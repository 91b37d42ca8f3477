#include "ops/moe_arguments.h"

#include <algorithm>
#include <limits>

#include "ops/launch.h"
#include "ops/weight_argument.h"

namespace kt::ops {
namespace {

constexpr bool kPositive = true;
struct Parameter {
    const char* name = nullptr;
    bool positive = false;
};
constexpr struct {
    const char* name;
    Activation activation;
    ActivationKind kind;
    Parameter parameters[kMaxActivationArgs];
} kActivations[] = {
#define KT_ACTIVATION(name, Type, kind, ...) {#name, Activation::k##Type, ActivationKind::kind, {__VA_ARGS__}},
#include "moe/activations.def"
#undef KT_ACTIVATION
};

void parse_activation(const Checker& check, const std::string& name, const std::vector<double>& args, Problem& p) {
    std::string names;
    for (const auto& known : kActivations) {
        names += (names.empty() ? "" : ", ") + std::string(known.name);
        if (name != known.name) continue;
        size_t count = 0;
        std::string expected;
        while (count < kMaxActivationArgs && known.parameters[count].name)
            expected += (count ? ", " : "") + std::string(known.parameters[count].name), ++count;
        check.require(args.size() == count, "activation_args must be [", expected, "] for activation '", name,
                      "', got ", static_cast<int64_t>(args.size()), " values");
        for (size_t i = 0; i < count; ++i) {
            check.finite("activation_args", args[i]);
            check.require(!known.parameters[i].positive || args[i] > 0, "activation_args must have a positive ",
                          known.parameters[i].name, " for activation '", name, "', got ", std::to_string(args[i]));
        }
        check.require(known.kind == ActivationKind::kOfGate || p.gating != Gating::kNone,
                      "activation must be a function of the gate for gating 'none', got '", name, "'");
        p.activation = known.activation;
        std::copy(args.begin(), args.end(), p.activation_args);
        return;
    }
    check.fail("activation must be one of " + names + ", got '" + name + "'");
}

Gating parse_gating(const Checker& check, const std::string& name) {
    if (name == "concatenated") return Gating::kConcatenated;
    if (name == "interleaved") return Gating::kInterleaved;
    if (name == "none") return Gating::kNone;
    check.fail("gating must be one of concatenated, interleaved, none, got '" + name + "'");
}

Computation parse_compute(const Checker& check, const std::string& name) {
    if (name == "auto") return Computation::kAuto;
    if (name == "bf16") return Computation::kFloat;
    if (name == "int8") return Computation::kInt8;
    check.fail("compute must be one of auto, bf16, int8, got '" + name + "'");
}

// Checks a projection, dense in the dtype of hidden_states or in a format.
WeightTensor projection(const Checker& check, const WeightNames& names, const Tensor& weight,
                        const OptionalTensor& scale, const OptionalTensor& zero, const std::string& format_name,
                        int64_t group_size, DType dtype) {
    if (const Format* format = find_format(check, names, format_name)) {
        return weight_argument(check, names, *format, group_size, weight, scale, zero);
    }
    check.require(group_size == 0, names.group_size, " must be 0 for ", names.format, " 'dense', got ", group_size);
    check.absent(names.scale, scale, names.format, "dense");
    check.absent(names.zero, zero, names.format, "dense");
    check.shape(names.weight, weight, {names.num_experts, names.rows, names.columns});
    check.same_dtype(names.weight, weight, "hidden_states", dtype);
    WeightTensor view;
    view.dense = strided(weight, dtype);
    return view;
}

// Requires a projection that can be multiplied in int8.
void check_int8(const Checker& check, const WeightNames& names, const WeightTensor& weight) {
    if (!weight.is_dense() && format_of(weight).code_group) return;
    check.fail(std::string("compute must be auto or bf16 for ") + names.format + " '" +
               (weight.is_dense() ? "dense" : format_of(weight).name) + "', got 'int8'");
}

// Returns how many threads the work is worth: waking one up costs about as much as kFlopsAThread FLOPs, or that many
// bytes of weights if they are used once.
int threads_for(const Problem& p) {
    constexpr int64_t kFlopsAThread = 1 << 19;
    const int64_t flops = 6 * p.num_tokens * p.top_k * p.hidden_size * p.intermediate_size;
    return ops::useful_threads(flops, kFlopsAThread);
}

// Checks a pair of LoRA factors, A [E, r, in] and B [E, out, r], and returns r, or 0 without them.
int64_t lora_rank(const Checker& check, const char* a_name, const OptionalTensor& a, Size in, const char* b_name,
                  const OptionalTensor& b, Size out, Size experts) {
    if (!a && !b) return 0;
    check.require(a.has_value(), a_name, " must be given together with ", b_name, ", got None");
    check.require(b.has_value(), b_name, " must be given together with ", a_name, ", got None");
    check.shape(a_name, *a, {experts, {"rank"}, in});
    const int64_t rank = a->size(1);
    check.require(rank > 0, a_name, " must have a rank of at least 1, got shape ", *a);
    check.shape(b_name, *b, {experts, out, {"rank", rank}});
    check.floating(a_name, *a);
    check.floating(b_name, *b);
    return rank;
}

}  // namespace

Tokens::Tokens(const Checker& check, const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
               const Problem& experts)
    : problem(experts), hidden_states(hidden_states), topk_ids(topk_ids), topk_weights(topk_weights) {
    Problem& p = problem;
    check.shape("hidden_states", hidden_states, {{"num_tokens"}, {"hidden_size"}});
    dtype = check.floating("hidden_states", hidden_states);
    p.num_tokens = hidden_states.size(0);
    p.hidden_size = hidden_states.size(1);
    check.shape("topk_ids", topk_ids, {{"num_tokens", p.num_tokens}, {"top_k"}});
    p.ids_are_int64 = check.is_int64_ids("topk_ids", topk_ids);
    p.top_k = topk_ids.size(1);
    check.shape("topk_weights", topk_weights, {{"num_tokens", p.num_tokens}, {"top_k", p.top_k}});
    p.topk_weights = strided(topk_weights, check.floating("topk_weights", topk_weights));
    check.require(p.num_tokens * p.top_k <= std::numeric_limits<int32_t>::max(),
                  "topk_ids must have at most 2^31 - 1 elements, got shape ", topk_ids);
}

void Tokens::point_to_tokens() {
    Problem& p = problem;
    hidden_states = as_contiguous(hidden_states);
    p.hidden_states = hidden_states.const_data_ptr();
    p.topk_ids = topk_ids.const_data_ptr();
    p.ids_stride[0] = topk_ids.stride(0);
    p.ids_stride[1] = topk_ids.stride(1);
    p.num_threads = threads_for(p);
    p.launch = launch;
    p.forced_path = forced_path();
}

Tensor Tokens::empty_output() const {
    const Problem& p = problem;
    const int64_t size[] = {p.num_tokens, p.reduce ? p.hidden_size : p.top_k, p.hidden_size};
    return ops::empty({size, size_t{p.reduce ? 2u : 3u}}, hidden_states.scalar_type());
}

MoeArguments::MoeArguments(const char* op, KT_MOE_ARGUMENTS(KT_PARAMETER))
    : Tokens(Checker(op), hidden_states, topk_ids, topk_weights),
      gate_up_proj(gate_up_proj),
      down_proj(down_proj),
      gate_up_bias(gate_up_bias),
      down_bias(down_bias),
      gate_up_lora_A(gate_up_lora_A),
      gate_up_lora_B(gate_up_lora_B),
      down_lora_A(down_lora_A),
      down_lora_B(down_lora_B) {
    const Checker check(op);
    Problem& p = problem;

    p.compute = parse_compute(check, compute);
    check.require(num_experts > 0, "num_experts must be at least 1, got ", num_experts, " (gate_up_proj has shape ",
                  gate_up_proj, ")");
    check.require(intermediate_size >= 0, "intermediate_size must not be negative, got ", intermediate_size);
    p.num_experts = num_experts;
    p.intermediate_size = intermediate_size;
    p.gating = parse_gating(check, gating);
    p.reduce = reduce;
    const Size experts{"num_experts", num_experts}, I{"intermediate_size", intermediate_size},
        two_I{"2*intermediate_size", 2 * intermediate_size}, H{"hidden_size", p.hidden_size};
    const Size& rows = p.gating == Gating::kNone ? I : two_I;
    const WeightNames gate_up{"gate_up_proj",       "gate_up_scale", "gate_up_zero", "gate_up_format",
                              "gate_up_group_size", experts,         rows,           H};
    const WeightNames down{"down_proj", "down_scale", "down_zero", "down_format", "down_group_size", experts, H, I};
    p.gate_up_proj = projection(check, gate_up, gate_up_proj, gate_up_scale, gate_up_zero, gate_up_format,
                                gate_up_group_size, dtype);
    p.down_proj = projection(check, down, down_proj, down_scale, down_zero, down_format, down_group_size, dtype);
    if (p.compute == Computation::kInt8) {
        check_int8(check, gate_up, p.gate_up_proj);
        check_int8(check, down, p.down_proj);
    }
    check.require(p.compute != Computation::kInt8 || dtype != DType::kFloat64,
                  "compute must be auto or bf16 for hidden_states in float64, got 'int8'");
    if (gate_up_bias) check.shape("gate_up_bias", *gate_up_bias, {experts, rows});
    if (down_bias) check.shape("down_bias", *down_bias, {experts, H});
    p.gate_up_rank =
        lora_rank(check, "gate_up_lora_A", gate_up_lora_A, H, "gate_up_lora_B", gate_up_lora_B, rows, experts);
    p.down_rank = lora_rank(check, "down_lora_A", down_lora_A, I, "down_lora_B", down_lora_B, H, experts);
    check.finite("gate_up_scaling", gate_up_scaling);
    check.finite("down_scaling", down_scaling);
    parse_activation(check, activation, activation_args, p);

    point_to_tensors(check);
    p.gate_up_scaling = gate_up_scaling;
    p.down_scaling = down_scaling;
    point_to_tokens();
}

void MoeArguments::point_to_tensors(const Checker& check) {
    Problem& p = problem;
    auto view = [&](const char* name, const OptionalTensor& t) {
        return t ? strided(*t, check.floating(name, *t)) : StridedTensor{};
    };
    p.gate_up_bias = view("gate_up_bias", gate_up_bias);
    p.down_bias = view("down_bias", down_bias);
    p.gate_up_lora_A = view("gate_up_lora_A", gate_up_lora_A);
    p.gate_up_lora_B = view("gate_up_lora_B", gate_up_lora_B);
    p.down_lora_A = view("down_lora_A", down_lora_A);
    p.down_lora_B = view("down_lora_B", down_lora_B);
}

int64_t MoeArguments::gate_up_columns() const {
    return (problem.gating == Gating::kNone ? 1 : 2) * problem.intermediate_size;
}

Tensor MoeArguments::empty(std::initializer_list<int64_t> size) const {
    return ops::empty({size.begin(), size.size()}, hidden_states.scalar_type());
}

bool keeps_activations(const char* op, const std::string& save) {
    Checker(op).require(save == "activations" || save == "recompute",
                        "save must be one of activations, recompute, got '", save, "'");
    return save == "activations";
}

}  // namespace kt::ops
