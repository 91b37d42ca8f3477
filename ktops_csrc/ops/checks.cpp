#include "ops/checks.h"

#include <cmath>
#include <stdexcept>

#include "core/huge_pages.h"

namespace kt::ops {

namespace {

constexpr struct {
    ScalarType type;
    DType dtype;
    const char* name;
} kFloating[] = {
    {ScalarType::Float, DType::kFloat32, "float32"},
    {ScalarType::BFloat16, DType::kBFloat16, "bfloat16"},
    {ScalarType::Half, DType::kFloat16, "float16"},
    {ScalarType::Double, DType::kFloat64, "float64"},
};

// PyTorch's name for a dtype.
std::string dtype_name(ScalarType type) {
    for (const auto& known : kFloating) {
        if (known.type == type) return known.name;
    }
    switch (type) {
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Float8_e4m3fn:
            return "float8_e4m3fn";
        default:
            return torch::headeronly::toString(type);
    }
}

const char* dtype_name(DType dtype) {
    for (const auto& known : kFloating) {
        if (known.dtype == dtype) return known.name;
    }
    return "";
}

}  // namespace

void Checker::fail(const std::string& message) const { throw std::runtime_error(std::string(op_) + ": " + message); }

std::string Checker::text(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + "]";
}

void Checker::shape(const char* name, const Tensor& tensor, std::initializer_list<Size> expected) const {
    require(tensor.is_cpu(), name, " must be on the cpu, got another device");
    bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
    int64_t i = 0;
    for (const Size& size : expected) {
        matches = matches && (size.value < 0 || tensor.size(i) == size.value);
        ++i;
    }
    if (matches) return;
    std::string shape;
    for (const Size& size : expected) {
        shape += (shape.empty() ? "" : ", ") + std::string(size.name);
        if (size.value >= 0) shape += "=" + std::to_string(size.value);
    }
    fail(std::string(name) + " must have shape [" + shape + "], got " + text(tensor));
}

DType Checker::floating(const char* name, const Tensor& tensor) const {
    return kFloating[one_of(name, tensor, {kFloating[0].type, kFloating[1].type, kFloating[2].type, kFloating[3].type})]
        .dtype;
}

void Checker::same_dtype(const char* name, const Tensor& tensor, const char* other_name, DType dtype) const {
    const ScalarType type = tensor.scalar_type();
    for (const auto& known : kFloating) {
        if (known.type == type && known.dtype == dtype) return;
    }
    fail(std::string(name) + " must be " + dtype_name(dtype) + " like " + other_name + ", got " + dtype_name(type));
}

bool Checker::is_int64_ids(const char* name, const Tensor& tensor) const {
    return one_of(name, tensor, {ScalarType::Int, ScalarType::Long}) == 1;
}

int64_t Checker::one_of(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected) const {
    const ScalarType type = tensor.scalar_type();
    int64_t i = 0;
    std::string names;
    for (const ScalarType& known : expected) {
        if (known == type) return i;
        names += (i == 0 ? "" : i + 1 == static_cast<int64_t>(expected.size()) ? " or " : ", ") + dtype_name(known);
        ++i;
    }
    fail(std::string(name) + " must be " + names + ", got " + dtype_name(type));
}

void Checker::int64(const char* name, const Tensor& tensor) const { one_of(name, tensor, {ScalarType::Long}); }

void Checker::finite(const char* name, double value) const {
    require(std::isfinite(value), name, " must be finite, got ",
            std::isnan(value) ? "nan"
            : value > 0       ? "inf"
                              : "-inf");
}

void Checker::absent(const char* name, const OptionalTensor& tensor, const char* format_name,
                     const char* format) const {
    require(!tensor, name, " must be None for ", format_name, " '", format, "', got a tensor");
}

Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    const Tensor tensor = torch::stable::empty(sizes, dtype);
    kt::ask_for_huge_pages(tensor.mutable_data_ptr(), bytes_of(tensor));
    return tensor;
}

StridedTensor strided(const Tensor& tensor, DType dtype) {
    StridedTensor view;
    view.data = tensor.const_data_ptr();
    view.dtype = dtype;
    for (int64_t i = 0; i < tensor.dim(); ++i) view.stride[i] = tensor.stride(i);
    return view;
}

}  // namespace kt::ops
