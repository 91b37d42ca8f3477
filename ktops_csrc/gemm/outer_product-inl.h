#pragma once

// C = S^T . L summed over the rows of an expert (k_grouped_tn): every weight gradient has this form.

#include "gemm/block_gemm-inl.h"

namespace kt::KT_ISA {

// Columns [first, first + count) of a matrix with one row per position, row i times scale[i] if scale is not null.
template <class T>
struct Operand {
    Rows<T> rows;
    int64_t first, count;
    const Acc<T>* scale = nullptr;

    void pack(int64_t row, int64_t n, int64_t column, int64_t count, Compute<T>* panels) const {
        using C = Compute<T>;
        const int64_t stride = panel_elements<C>(n);
        if (!scale) return pack_nn(rows.from(row), first + column, count, n, panels, stride);
        for (int64_t j = 0; j < count; j += kPanelColumns, panels += stride) {
            pack_nn_scaled(
                rows.from(row), first + column + j, smaller(kPanelColumns, count - j), n, panels,
                [&](int64_t k) { return scale[row + k]; }, 0, round_up(n, kKMultiple<C>));
        }
    }
};

// Calls put(i, m, c, ldc) for rows [i, i + m) of C, right.count accumulators each. round_up(rows, kRowStep) *
// right.count is at most kMaxRows * kMaxColumns.
template <class T, class Put>
inline void outer_product(const GemmScratch<T>& scratch, int64_t rows, const Operand<T>& left, const Operand<T>& right,
                          Put put) {
    const int64_t columns = round_up(right.count, kPanelColumns);
    // The most columns of S whose panels, and whose rows of C, fit in scratch.
    const int64_t most =
        smaller(kMaxRows * kMaxColumns / columns / kRowStep * kRowStep, GemmScratch<T>::kLeftElements / kMaxRows);
    for (int64_t i = 0; i < left.count; i += most) {
        const int64_t m = smaller(most, left.count - i);
        BlockGemm<T> block(scratch, m, columns);
        for_each_row_block(rows, [&](int64_t row, int64_t n) {
            left.pack(row, n, i, m, scratch.left_panels());
            right.pack(row, n, 0, right.count, scratch.panels);
            block.multiply_panels(scratch.left_panels(), scratch.panels, n);
        });
        put(i, m, block.row(0), columns);
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
        if (result.dtype == DType::kFloat16) return write(static_cast<float16*>(result.data) + offset);
    } else {
        if (result.dtype == DType::kFloat64) return write(static_cast<double*>(result.data) + offset);
    }
    for (int64_t k = 0; k < n; ++k) result.put(e, i, j + k, values[k] * scale);
}

// Writes the rows of outer_product(): result[expert][i .. i + m)[column .. column + n) = scale * c
template <class A>
struct PutRows {
    const Result& result;
    int64_t expert, column, n;
    A scale = 1;

    void operator()(int64_t i, int64_t m, const A* c, int64_t ldc) const {
        for (int64_t k = 0; k < m; ++k) put_row(result, expert, i + k, column, n, c + k * ldc, scale);
    }
};

// Writes them transposed: result[expert][column .. column + n)[i .. i + m) = scale * c
template <class A>
struct PutColumns {
    const Result& result;
    int64_t expert, column, n;
    A scale = 1;

    void operator()(int64_t i, int64_t m, const A* c, int64_t ldc) const {
        for (int64_t j0 = 0; j0 < n; j0 += 16) {
            for (int64_t i0 = 0; i0 < m; i0 += 16) {
                const int64_t rows = smaller(16, m - i0), columns = smaller(16, n - j0);
                alignas(64) A block[16 * 16], transposed[16 * 16];
                for (int64_t k = 0; k < rows; ++k) {
                    std::memcpy(block + 16 * k, c + (i0 + k) * ldc + j0, 16 * sizeof(A));
                }
                if constexpr (sizeof(A) == sizeof(uint32_t)) {
                    transpose_16x16(reinterpret_cast<const char*>(block), 64, reinterpret_cast<uint32_t*>(transposed));
                } else {
                    for (int64_t k = 0; k < 16 * 16; ++k) transposed[k % 16 * 16 + k / 16] = block[k];
                }
                PutRows<A>{result, expert, i + i0, rows, scale}(column + j0, columns, transposed, 16);
            }
        }
    }
};

// Columns [column, column + right.count) of an expert's weight gradient, S^T L; its rows are the columns of S. If it is
// transposed like the weight, it is computed as L^T S, so that it is written along the rows in memory.
template <class T>
inline void weight_gradient(const GemmScratch<T>& scratch, int64_t rows, const Operand<T>& left,
                            const Operand<T>& right, const Result& result, int64_t expert, int64_t column) {
    using Put = PutRows<Acc<T>>;
    if (!result.is_transposed) {
        return outer_product(scratch, rows, left, right, Put{result, expert, column, right.count});
    }
    for (int64_t j = 0; j < left.count; j += kMaxColumns) {
        const int64_t n = smaller(kMaxColumns, left.count - j);
        const Operand<T> some{left.rows, left.first + j, n, left.scale};
        outer_product(scratch, rows, right, some, [&](int64_t i, int64_t m, const Acc<T>* c, int64_t ldc) {
            Put{result, expert, j, n}(column + i, m, c, ldc);
        });
    }
}

}  // namespace kt::KT_ISA
