#pragma once

// Errors that name the argument, what was expected and what was given:
//   kt::moe_sft_fwd: topk_ids must have shape [num_tokens=128, top_k], got [64, 8]

#include <initializer_list>
#include <string>

#include "core/views.h"
#include "ops/ops.h"

namespace kt::ops {

using torch::headeronly::ScalarType;

// An expected size: its name, and its value, or -1 for any.
struct Size {
    const char* name;
    int64_t value = -1;
};

class Checker {
public:
    explicit Checker(const char* op) : op_(op) {}

    [[noreturn]] void fail(const std::string& message) const;
    // Builds the message, from texts, numbers and the shapes of tensors, only if the condition fails.
    template <class... Parts>
    void require(bool condition, const Parts&... parts) const {
        if (!condition) fail((text(parts) + ...));
    }

    // Requires a tensor on the CPU with this shape.
    void shape(const char* name, const Tensor& tensor, std::initializer_list<Size> expected) const;
    // Require a tensor of one of the floating dtypes, of exactly `dtype`, of an integer dtype for ids, of int64.
    DType floating(const char* name, const Tensor& tensor) const;
    void same_dtype(const char* name, const Tensor& tensor, const char* other_name, DType dtype) const;
    bool is_int64_ids(const char* name, const Tensor& tensor) const;
    void int64(const char* name, const Tensor& tensor) const;
    void finite(const char* name, double value) const;
    void absent(const char* name, const OptionalTensor& tensor, const char* format_name, const char* format) const;
    // Requires one of several dtypes, and returns its index.
    int64_t one_of(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected) const;

private:
    static std::string text(const std::string& part) { return part; }
    static std::string text(const char* part) { return part; }
    static std::string text(int64_t number) { return std::to_string(number); }
    static std::string text(const Tensor& tensor);  // [64, 8]

    const char* op_;
};

// Returns the tensor itself if it is contiguous: the check is much cheaper than PyTorch's operator.
Tensor as_contiguous(const Tensor& tensor);

// Returns a new, uninitialized tensor, in huge pages where the system grants them. With glibc, a large tensor is fresh
// memory in every call, whose page faults can take longer than the kernel.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

inline size_t bytes_of(const Tensor& tensor) { return static_cast<size_t>(tensor.numel()) * tensor.element_size(); }

// The kernels' view of a tensor.
StridedTensor strided(const Tensor& tensor, DType dtype);

}  // namespace kt::ops
