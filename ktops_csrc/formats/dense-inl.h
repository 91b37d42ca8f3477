#pragma once

// Plain row-major weights [E, rows, columns] in the dtype of the activations, read where they lie.
//
// A weight format is a type with
//   decode_nt(e, row, n, k, kn, panels, stride)     panels of rows [row, row + n), k in [k, k + kn) along a row
//   decode_nn(e, k, kn, column, n, panels, stride)  panels of columns [column, column + n), k down the rows
// each writing ceil(n / 16) panels of Compute<T>, `stride` elements apart, zero beyond the block. With kDirect it also
// has
//   direct(e)                                       the rows as they lie, row_stride apart; null if not contiguous

#include "formats/strided-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

template <class T>
struct DenseWeight {
    static constexpr bool kDirect = true;

    StridedWeight<T> strided;
    int64_t row_stride;

    explicit DenseWeight(const StridedTensor& tensor) : strided{tensor}, row_stride(tensor.stride[1]) {}

    const T* direct(int64_t e) const {
        const StridedTensor& tensor = strided.tensor;
        return tensor.stride[2] == 1 ? static_cast<const T*>(tensor.data) + e * tensor.stride[0] : nullptr;
    }

    void decode_nt(int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, Compute<T>* panels, int64_t stride) const {
        const T* w = direct(e);
        if (!w) return strided.decode_nt(e, row, n, k, kn, panels, stride);
        w += row * row_stride + k;
        for (int64_t j = 0; j < n; j += kPanelColumns, panels += stride) {
            pack_nt(w + j * row_stride, row_stride, smaller(kPanelColumns, n - j), kn, panels);
        }
    }

    void decode_nn(int64_t e, int64_t k, int64_t kn, int64_t column, int64_t n, Compute<T>* panels,
                   int64_t stride) const {
        const T* w = direct(e);
        if (!w) return strided.decode_nn(e, k, kn, column, n, panels, stride);
        const Rows<T> rows{w + k * row_stride, row_stride, nullptr};
        pack_nn(rows, column, n, kn, panels, stride);
    }
};

}  // namespace kt::KT_ISA
