#pragma once

// C = S^T . L summed over the rows of an expert (k_grouped_tn): every weight gradient has this form.

#include "gemm/block_gemm-inl.h"

namespace kt::KT_ISA {

// Columns [first, first + count) of a matrix whose rows are routes, row i times scale[i] if there is a scale.
template <class T>
struct Operand {
    Rows<T> rows;
    int64_t first, count;
    const Acc<T>* scale = nullptr;

    void pack(int64_t row, int64_t n, int64_t column, int64_t count, Compute<T>* panels) const {
        const int64_t stride = panel_elements<Compute<T>>(n);
        for (int64_t j = 0; j < count; j += kPanelColumns, panels += stride) {
            pack_nn(rows.from(row), first + column + j, smaller(kPanelColumns, count - j), n, panels,
                    scale ? scale + row : nullptr);
        }
    }
};

// put(i, c): row i of C, right.count <= kMaxColumns accumulators.
template <class T, class Put>
inline void outer_product(const GemmScratch<T>& scratch, int64_t rows, const Operand<T>& left, const Operand<T>& right,
                          Put put) {
    constexpr int64_t kBlock = GemmScratch<T>::kLeftElements / kMaxRows;  // columns of S whose panels fit in scratch
    const int64_t columns = round_up(right.count, kPanelColumns);
    for (int64_t i = 0; i < left.count; i += kBlock) {
        const int64_t m = smaller(kBlock, left.count - i);
        BlockGemm<T> block(scratch, m, columns);
        for_each_row_block(rows, [&](int64_t row, int64_t n) {
            left.pack(row, n, i, m, scratch.left);
            right.pack(row, n, 0, right.count, scratch.panels);
            block.multiply_panels(scratch.left, scratch.panels, n);
        });
        for (int64_t j = 0; j < m; ++j) put(i + j, block.row(j));
    }
}

// result[e][i][j .. j + n) = scale * values
template <class A>
inline void put_row(const Result& result, int64_t e, int64_t i, int64_t j, int64_t n, const A* values, A scale) {
    const int64_t offset = (e * result.size[1] + i) * result.size[2] + j;
    auto write = [&](auto* out) {
        for_each_vector<A>(n, [&](int64_t k, int64_t count) { store_n(out + k, load(values + k) * scale, count); });
    };
    if constexpr (sizeof(A) == sizeof(float)) {
        if (result.dtype == DType::kFloat32) return write(static_cast<float*>(result.data) + offset);
        if (result.dtype == DType::kBFloat16) return write(static_cast<bfloat16*>(result.data) + offset);
    } else {
        if (result.dtype == DType::kFloat64) return write(static_cast<double*>(result.data) + offset);
    }
    for (int64_t k = 0; k < n; ++k) result.put(e, i, j + k, values[k] * scale);
}

// result[e][j .. j + n)[i] = scale * values
template <class A>
inline void put_column(const Result& result, int64_t e, int64_t i, int64_t j, int64_t n, const A* values, A scale) {
    const int64_t offset = (e * result.size[1] + j) * result.size[2] + i;
    auto write = [&](auto* out) {
        using S = std::remove_pointer_t<decltype(out)>;
        for (int64_t k = 0; k < n; ++k) out[k * result.size[2]] = from_float<S>(values[k] * scale);
    };
    switch (result.dtype) {
        case DType::kFloat32:
            return write(static_cast<float*>(result.data) + offset);
        case DType::kBFloat16:
            return write(static_cast<bfloat16*>(result.data) + offset);
        case DType::kFloat64:
            return write(static_cast<double*>(result.data) + offset);
    }
}

}  // namespace kt::KT_ISA
