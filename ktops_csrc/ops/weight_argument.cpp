#include "ops/weight_argument.h"

namespace kt::ops {
namespace {

int64_t element_bytes(Element element) {
    return element == Element::kFloat32 ? 4 : element == Element::kBFloat16 || element == Element::kFloat16 ? 2 : 1;
}

// Checks values of groups, [E, rows, groups], or with row blocks [E, ceil(rows / group_size), groups].
GroupValues group_values(const Checker& check, const WeightNames& names, const char* name, const OptionalTensor& values,
                         const Format& format, int64_t group_size, bool exponents, bool integers) {
    check.require(values.has_value(), name, " must be given for ", names.format, " '", format.name, "', got None");
    const int64_t rows = names.rows.value;
    const Size groups{"groups", group_size ? ceil_div(names.columns.value, group_size) : 1};
    GroupValues view;
    if (group_size && values->dim() == 3 && values->size(1) != rows && values->size(1) == ceil_div(rows, group_size)) {
        view.row_block = group_size;
    }
    check.shape(name, *values, {names.num_experts, {"rows", ceil_div(rows, view.row_block)}, groups});
    check.require(values->size(2) == 1 || values->stride(2) == 1, name,
                  " must be contiguous in its last dimension, got stride ", values->stride(2));
    if (exponents) {
        check.one_of(name, *values, {ScalarType::Byte});
        view.type = GroupValues::Type::kExponent;
    } else {
        constexpr GroupValues::Type kTypes[] = {GroupValues::Type::kFloat32, GroupValues::Type::kBFloat16,
                                                GroupValues::Type::kFloat16, GroupValues::Type::kUInt8};
        const int64_t type =
            integers ? check.one_of(name, *values,
                                    {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte})
                     : check.one_of(name, *values, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
        view.type = kTypes[type];
    }
    view.data = values->const_data_ptr();
    view.expert_stride = values->stride(0);
    view.row_stride = values->stride(1);
    return view;
}

}  // namespace

ScalarType scalar_type(Element element) {
    switch (element) {
        case Element::kBFloat16:
            return ScalarType::BFloat16;
        case Element::kFloat16:
            return ScalarType::Half;
        case Element::kFloat32:
            return ScalarType::Float;
        case Element::kInt8:
            return ScalarType::Char;
        case Element::kUInt8:
            return ScalarType::Byte;
        case Element::kFloat8:
            return ScalarType::Float8_e4m3fn;
    }
    return ScalarType::Undefined;
}

Size row_size(const Checker& check, const WeightNames& names, const Format& format) {
    const int64_t columns = names.columns.value;
    if (format.block == 1) return names.columns;
    if (format.block == 2) return {"columns/2", ceil_div(columns, 2)};
    check.require(columns % format.block == 0, names.weight, " in format '", format.name,
                  "' must have rows of a multiple of ", format.block, " weights, got ", columns);
    return {"row_bytes", columns / format.block * format.bytes};
}

void check_group_size(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size) {
    const auto require = [&](bool condition, const char* must) {
        check.require(condition, names.group_size, must, " for ", names.format, " '", format.name, "', got ",
                      group_size);
    };
    if (format.scales == Scales::kNone) {
        require(group_size == 0, " must be 0");
    } else if (format.scales == Scales::kFloats) {
        require(group_size >= 0 && group_size % kExponentGroup == 0, " must be 0 or a multiple of 32");
    } else {
        require(group_size == kExponentGroup, " must be 32");
        check.require(names.columns.value % kExponentGroup == 0, names.weight, " in format '", format.name,
                      "' must have rows of a multiple of 32 weights, got ", names.columns.value);
    }
}

const Format* find_format(const Checker& check, const WeightNames& names, const std::string& name) {
    if (name == "dense") return nullptr;
    std::string known = "dense";
    for (const Format& format : kFormats) {
        if (name == format.name) return &format;
        known += std::string(", ") + format.name;
    }
    check.fail(std::string(names.format) + " must be one of " + known + ", got '" + name + "'");
}

WeightTensor weight_argument(const Checker& check, const WeightNames& names, const Format& format, int64_t group_size,
                             const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& zero) {
    check_group_size(check, names, format, group_size);
    constexpr int64_t kAll = int64_t{1} << 40;  // columns or rows: more than any weight has, and sums don't overflow
    group_size = smaller(group_size, kAll);
    check.shape(names.weight, weight, {names.num_experts, names.rows, row_size(check, names, format)});
    check.one_of(names.weight, weight, {scalar_type(format.element)});
    check.require(weight.size(2) <= 1 || weight.stride(2) == 1, names.weight,
                  " must be contiguous in its last dimension, got stride ", weight.stride(2));
    WeightTensor view;
    view.format = format.id;
    view.codes = static_cast<const uint8_t*>(weight.const_data_ptr());
    view.expert_bytes = weight.stride(0) * element_bytes(format.element);
    view.row_bytes = weight.stride(1) * element_bytes(format.element);
    view.columns = names.columns.value;
    view.group = group_size ? group_size : kAll;
    if (format.scales == Scales::kNone) {
        check.absent(names.scale, scale, names.format, format.name);
    } else {
        const bool exponents = format.scales == Scales::kExponents;
        view.scale = group_values(check, names, names.scale, scale, format, group_size, exponents, false);
    }
    if (format.zeros) {
        view.zero = group_values(check, names, names.zero, zero, format, group_size, false, true);
    } else {
        check.absent(names.zero, zero, names.format, format.name);
    }
    return view;
}

}  // namespace kt::ops
