#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "core/float16.h"

namespace kt {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A tensor of up to three dimensions, of any floating dtype, with any strides (in elements). data is null if absent.
struct StridedTensor {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t stride[3] = {0, 0, 0};

    explicit operator bool() const { return data != nullptr; }

    // True if columns of a matrix are contiguous and rows are not.
    bool is_transposed() const { return stride[1] == 1 && stride[2] != 1; }
    StridedTensor transposed() const { return {data, dtype, {stride[0], stride[2], stride[1]}}; }

    double at(int64_t i, int64_t j, int64_t k = 0) const {
        const int64_t offset = i * stride[0] + j * stride[1] + k * stride[2];
        switch (dtype) {
            case DType::kFloat32:
                return read(static_cast<const float*>(data) + offset);
            case DType::kBFloat16:
                return to_float(read(static_cast<const bfloat16*>(data) + offset));
            case DType::kFloat16:
                return to_float(read(static_cast<const float16*>(data) + offset));
            case DType::kFloat64:
                break;
        }
        return read(static_cast<const double*>(data) + offset);
    }
};

// A freshly allocated, contiguous result of up to three dimensions. data is null if it was not requested.
struct Result {
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t size[3] = {1, 1, 1};
    bool is_transposed = false;  // holds the transpose of each matrix

    explicit operator bool() const { return data != nullptr; }

    int64_t bytes() const {
        const int64_t element = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
        return size[0] * size[1] * size[2] * element;
    }

    void put(int64_t i, int64_t j, int64_t k, double value) const {
        const int64_t offset = (i * size[1] + j) * size[2] + k;
        switch (dtype) {
            case DType::kFloat32:
                static_cast<float*>(data)[offset] = static_cast<float>(value);
                return;
            case DType::kBFloat16:
                static_cast<bfloat16*>(data)[offset] = from_float<bfloat16>(value);
                return;
            case DType::kFloat16:
                static_cast<float16*>(data)[offset] = from_float<float16>(value);
                return;
            case DType::kFloat64:
                break;
        }
        static_cast<double*>(data)[offset] = value;
    }
};

// Row i is base + index[i] * stride, or base + i * stride without an index. Elements of a row are contiguous.
template <class T>
struct Rows {
    const T* base = nullptr;
    int64_t stride = 0;
    const int32_t* index = nullptr;

    const T* row(int64_t i) const { return base + (index ? index[i] : i) * stride; }
    Rows from(int64_t i) const {
        return index ? Rows{base, stride, index + i} : Rows{base + i * stride, stride, nullptr};
    }
};

}  // namespace kt
