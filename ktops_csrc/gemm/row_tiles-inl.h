#pragma once

// kRowTiles: products along the rows of W, with rows of W as tiles, in place or after decoding, and A in panels.

#include "gemm/scratch-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

// C = A . W^T
template <class T, class Weight>
inline void row_tiles(const Block<T>& block, const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert,
                      const Columns& columns) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    const GemmScratch<T>& scratch = block.scratch;
    const T* w = weight.direct(expert);
    const int64_t most = smaller(kMaxRows, kPanelBytes / kBytes / larger(k, 1) / kRowStep * kRowStep);
    // Not a power of two, or the lines of decoded rows would share a few sets of the cache.
    const int64_t apart = k + 64 / kBytes, decoded = kRowBytes / kBytes / apart / kRowStep * kRowStep;
    const int64_t stride = panel_elements<T>(k);
    for (int64_t i = 0; i < block.rows; i += most) {
        const int64_t m = smaller(most, block.rows - i);
        for (int64_t j = 0; j < m; j += kPanelColumns) {
            pack_rows(a, i + j, smaller(kPanelColumns, m - j), k, scratch.panels + j / kPanelColumns * stride);
        }
        const auto tiles = [&](const T* rows, int64_t row_stride, int64_t n, Acc<T>* c) {
            MicroGemm<T>::multiply_rows(rows, row_stride, n, scratch.panels, stride, m, k, c, block.columns);
        };
        for_each_range(columns, block.row(i), [&](int64_t row, Acc<T>* c) {
            if (w) return tiles(w + row * weight.row_stride, weight.row_stride, columns.count, c);
            for (int64_t j = 0; j < columns.count; j += decoded) {
                const int64_t n = smaller(decoded, columns.count - j), before = larger(0, kPanelColumns - n);
                T* rows = scratch.decoded_rows();
                weight.decode_rows(expert, row + j - before, before + n, 0, k, rows, apart);
                tiles(rows + before * apart, apart, n, c + j);
            }
        });
    }
}

}  // namespace kt::KT_ISA
