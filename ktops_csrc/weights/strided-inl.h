#pragma once

// LoRA factors: small matrices [E, rows, columns] of any dtype and strides, times a constant.
// (PEFT stores lora_B as [rows, r, E], the expert innermost, and both factors in float32 even if weights are bfloat16.)

#include <cstdint>
#include <type_traits>

#include "core/views.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

template <class T>
struct StridedWeight {
    using C = Compute<T>;
    static constexpr bool kDirect = false, transposed = false;

    StridedTensor tensor;
    double scale = 1;

    void decode_nt(int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, C* panels, int64_t stride,
                   T* = nullptr) const {
        decode(e, row, n, tensor.stride[1], k, kn, tensor.stride[2], panels, stride);
    }

    void decode_nn(int64_t e, int64_t k, int64_t kn, int64_t column, int64_t n, C* panels, int64_t stride,
                   T* = nullptr) const {
        decode(e, column, n, tensor.stride[2], k, kn, tensor.stride[1], panels, stride);
    }

    // Copies rows [row, row + n), columns [column, column + count), contiguously.
    void copy_rows(int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out) const {
        for (int64_t i = row; i < row + n; ++i) {
            for (int64_t j = column; j < column + count; ++j) {
                *out++ = from_float<T>(static_cast<Acc<T>>(tensor.at(e, i, j) * scale));
            }
        }
    }

private:
    void decode(int64_t e, int64_t j0, int64_t n, int64_t j_stride, int64_t k0, int64_t kn, int64_t k_stride, C* panels,
                int64_t stride) const {
        const int64_t offset = e * tensor.stride[0] + j0 * j_stride + k0 * k_stride;
        switch (tensor.dtype) {
            case DType::kFloat32:
                return copy(static_cast<const float*>(tensor.data) + offset, n, j_stride, kn, k_stride, panels, stride);
            case DType::kBFloat16:
                return copy(static_cast<const bfloat16*>(tensor.data) + offset, n, j_stride, kn, k_stride, panels,
                            stride);
            case DType::kFloat16:
                return copy(static_cast<const float16*>(tensor.data) + offset, n, j_stride, kn, k_stride, panels,
                            stride);
            case DType::kFloat64:
                return copy(static_cast<const double*>(tensor.data) + offset, n, j_stride, kn, k_stride, panels,
                            stride);
        }
    }

    template <class S>
    void copy(const S* source, int64_t n, int64_t j_stride, int64_t kn, int64_t k_stride, C* panels,
              int64_t stride) const {
        const Acc<T> factor = static_cast<Acc<T>>(scale);
        for (int64_t j = 0; j < n; j += kPanelColumns, source += kPanelColumns * j_stride, panels += stride) {
            const int64_t columns = smaller(kPanelColumns, n - j);
            if constexpr (std::is_same_v<Acc<S>, Acc<T>> && sizeof(C) <= 4) {
                if (k_stride == 1) {
                    pack_nt_scaled(source, j_stride, columns, kn, panels, factor);
                    continue;
                }
                if (j_stride == 1) {
                    const Rows<S> rows{source, k_stride, nullptr};
                    pack_nn_scaled(
                        rows, 0, columns, kn, panels, [&](int64_t) { return factor; }, 0, round_up(kn, kKMultiple<C>));
                    continue;
                }
            }
            copy_elements(source, columns, j_stride, kn, k_stride, panels);
        }
    }

    template <class S>
    void copy_elements(const S* source, int64_t n, int64_t j_stride, int64_t kn, int64_t k_stride, C* panel) const {
        constexpr int64_t P = kPack<C>;
        const Acc<T> factor = static_cast<Acc<T>>(scale);
        for (int64_t j = 0; j < kPanelColumns; ++j) {
            const S* from = source + j * j_stride;
            C* to = panel + j * P;
            for (int64_t k = 0; k < round_up(kn, kKMultiple<C>); ++k) {
                const bool inside = j < n && k < kn;
                to[k / P * P * kPanelColumns + k % P] =
                    inside ? from_float<C>(static_cast<Acc<T>>(load_scalar(from + k * k_stride)) * factor) : C{};
            }
        }
    }
};

// Loads n elements of a row of a bias [E, columns], as accumulators.
template <class A>
inline void load_bias(const StridedTensor& bias, int64_t e, int64_t column, int64_t n, A* out) {
    for (int64_t j = 0; j < n; ++j) out[j] = bias ? static_cast<A>(bias.at(e, column + j)) : A{};
}

}  // namespace kt::KT_ISA
