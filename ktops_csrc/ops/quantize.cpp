#include "quantize/problem.h"

#include "dispatch/table.h"
#include "ops/launch.h"
#include "ops/weight_argument.h"

namespace kt::ops {
namespace {

constexpr const char* kMethods[] = {"rtn", "mse", "hqq"};

bool can_quantize(const Format& format) {
    return format.block > 1 ? format.id != FormatId::iq4_nl && format.id != FormatId::iq4_xs
                            : format.scales != Scales::kNone;
}

bool has_search(const Format& format) {
    return format.scales == Scales::kFloats ? format.element != Element::kFloat8 : format.block == 256;
}

Method find_method(const Checker& check, const Format& format, const std::string& name) {
    std::string known;
    for (int i = 0; i < 3; ++i) {
        const bool supported = i == 0 || (i == 1 ? has_search(format) : format.zeros);
        if (!supported) continue;
        if (name == kMethods[i]) return static_cast<Method>(i);
        known += (known.empty() ? "" : ", ") + std::string(kMethods[i]);
    }
    check.fail("method must be one of " + known + " for weight_format '" + format.name + "', got '" + name + "'");
}

// Returns a format with kernels that quantize.
const Format& find_quantizable(const Checker& check, const WeightNames& names, const std::string& name) {
    const Format* format = find_format(check, names, name);
    std::string known;
    for (const Format& each : kFormats) {
        if (can_quantize(each)) known += (known.empty() ? "" : ", ") + std::string(each.name);
    }
    check.require(format && can_quantize(*format), "weight_format must be one of ", known, ", got '", name, "'");
    return *format;
}

struct Codes {
    Tensor weight;
    OptionalTensor scale, zero;
};

// Allocates the codes, and describes them in the problem.
Codes allocate(const Checker& check, const WeightNames& names, const Format& format, QuantizeProblem& p) {
    p.row_bytes = row_size(check, names, format).value;  // every element is a byte
    Codes out{empty({p.experts, p.rows, p.row_bytes}, scalar_type(format.element)), {}, {}};
    p.codes = static_cast<uint8_t*>(out.weight.mutable_data_ptr());
    if (format.scales == Scales::kNone) return out;
    const bool blocks = format.id == FormatId::fp8_e4m3 && !p.row_scale;
    const int64_t rows = blocks ? ceil_div(p.rows, p.group) : p.rows;
    const ScalarType type = format.scales == Scales::kExponents ? ScalarType::Byte
                            : p.row_scale || blocks             ? ScalarType::Float
                                                                : ScalarType::BFloat16;
    out.scale = empty({p.experts, rows, p.groups()}, type);
    p.scale = out.scale->mutable_data_ptr();
    if (format.zeros) {
        out.zero = empty({p.experts, rows, p.groups()}, p.method == Method::kRtn ? ScalarType::Byte : ScalarType::Half);
        p.zero = out.zero->mutable_data_ptr();
    }
    return out;
}

}  // namespace

std::tuple<Tensor, OptionalTensor, OptionalTensor> quantize(Tensor weight, std::string weight_format,
                                                            int64_t group_size, std::string method) {
    const Checker check("kt::quantize");
    check.shape("weight", weight, {{"num_experts"}, {"rows"}, {"columns"}});
    QuantizeProblem p;
    p.experts = weight.size(0);
    p.rows = weight.size(1);
    p.columns = weight.size(2);
    check.require(p.columns > 0, "weight must have at least one column, got shape ", weight);
    const WeightNames names{"weight",         "scale",
                            "zero",           "weight_format",
                            "group_size",     {"num_experts", p.experts},
                            {"rows", p.rows}, {"columns", p.columns}};
    const Format& format = find_quantizable(check, names, weight_format);
    check_group_size(check, names, format, group_size);
    constexpr int64_t kMostGroup = 1 << 20;
    check.require(group_size <= kMostGroup, "group_size must be at most ", kMostGroup, ", got ", group_size);
    check.require(format.id != FormatId::fp8_e4m3 || group_size == 0 || group_size == 128,
                  "group_size must be 0 or 128 for weight_format 'fp8_e4m3', got ", group_size);
    p.method = find_method(check, format, method);
    constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    p.weight = strided(
        weight, kDTypes[check.one_of("weight", weight, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half})]);
    p.format = format.id;
    p.row_scale = group_size == 0;
    p.group = group_size ? group_size : p.columns;
    Codes out = allocate(check, names, format, p);
    constexpr int64_t kWeightsAThread = 1 << 16;
    p.num_threads = useful_threads(p.experts * p.rows * p.columns, kWeightsAThread);
    p.launch = launch;
    dispatch::current().quantize(p);
    return {out.weight, out.scale, out.zero};
}

}  // namespace kt::ops
