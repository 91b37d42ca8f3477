#pragma once

// Products of few rows of A, without panels: W is read once, in place. kDots, kDecodedDots and kColumnSums.

#include "gemm/scratch-inl.h"
#include "isa/chunk-inl.h"
#include "isa/direct-inl.h"

namespace kt::KT_ISA {

// C = A . W^T. Rows of W that aren't contiguous are copied first, as many at a time as fit in scratch.
template <class T, class Weight>
inline void dots(const Block<T>& block, const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert,
                 const Columns& columns) {
    const T* rows[kMaxRows];
    for (int64_t i = 0; i < block.rows; ++i) rows[i] = a.row(i);
    const T* w = weight.direct(expert);
    const int64_t most = kPanelBytes / static_cast<int64_t>(sizeof(T)) / larger(k, 1) / kDotRows * kDotRows;
    for_each_range(columns, block.row(0), [&](int64_t row, Acc<T>* c) {
        const int64_t n = columns.count;
        if (w) {
            return Direct<T>::dots(rows, block.rows, w + row * weight.row_stride, weight.row_stride, n, k, c,
                                   block.columns);
        }
        T* copy = block.scratch.copied_rows();
        for (int64_t j = 0; j < n; j += most) {
            const int64_t count = smaller(most, n - j);
            weight.copy_rows(expert, row + j, count, 0, k, copy);
            Direct<T>::dots(rows, block.rows, copy, k, count, k, c + j, block.columns);
        }
    });
}

// C = A . W^T for a weight in a format, each weight used as it is decoded.
template <class T, class Weight>
inline void decoded_dots(const Block<T>& block, const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert,
                         const Columns& columns) {
    static_assert(kChunk == 32, "is_possible(kDecodedDots) relies on it");
    const int64_t stride = round_up(k, kChunk);
    const float* x[kMaxRows];
    float* ordered = block.scratch.ordered_rows();
    for (int64_t i = 0; i < block.rows; ++i, ordered += stride) {
        weight.order_row(a.row(i), ordered);
        x[i] = ordered;
    }
    for_each_range(columns, block.row(0), [&](int64_t row, float* c) {
        weight.dots(expert, row, columns.count, x, block.rows, c, block.columns);
    });
}

// C (+)= A . W
template <class T, class Weight>
inline void column_sums(const Block<T>& block, const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert,
                        const Columns& columns) {
    constexpr int64_t kRowsAhead = Direct<T>::kRowsAhead;
    const int64_t elements = kPanelBytes / static_cast<int64_t>(sizeof(T));
    const T* w = weight.direct(expert);
    T* copy = block.scratch.copied_rows();
    const int64_t most = w ? k : elements / columns.count / kRowsAhead * kRowsAhead;
    for (int64_t k0 = 0; k0 < k; k0 += most) {
        const T* rows[kMaxRows];
        for (int64_t i = 0; i < block.rows; ++i) rows[i] = a.row(i) + k0;
        const int64_t kn = smaller(most, k - k0);
        for_each_range(columns, block.row(0), [&](int64_t first, Acc<T>* c) {
            if (!w) weight.copy_rows(expert, k0, kn, first, columns.count, copy);
            Direct<T>::columns(rows, block.rows, w ? w + k0 * weight.row_stride + first : copy,
                               w ? weight.row_stride : columns.count, columns.count, kn, c, block.columns,
                               block.adds || k0 > 0);
        });
    }
}

}  // namespace kt::KT_ISA
