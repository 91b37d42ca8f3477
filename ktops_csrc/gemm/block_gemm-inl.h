#pragma once

// One block of C = A . B in a thread's scratch memory, for any k. gemm/path.h limits its size and chooses how a product
// with a weight is computed.

#include "gemm/few_rows-inl.h"
#include "gemm/panels-inl.h"
#include "gemm/path-inl.h"
#include "gemm/row_bands-inl.h"

namespace kt::KT_ISA {

// x W^T of an expert's rows, or of a block of them, with the rows of W in `columns`.
template <class T, class Weight>
inline Product product_along_rows(const Weight& weight, int64_t expert, int64_t rows, int64_t k,
                                  const Columns& columns) {
    Product product{};
    product.along_rows = true;
    product.rows = rows;
    product.columns = columns.total();
    product.k = k;
    product.end = columns.first + columns.count;
    product.contiguous = weight.direct(expert) != nullptr;
    product.has_format = weight.has_format();
    product.few_rows = weight.few_rows();
    return product;
}

// True if this product, and one of inner dimension `added` in the same pass, is best computed in bands.
template <class T, class Weight>
inline bool prefers_bands(const Weight& weight, int64_t expert, int64_t rows, int64_t k, const Columns& columns,
                          int64_t added, std::optional<Path> forced) {
    if (weight.transposed) return false;
    Product product = product_along_rows<T>(weight, expert, rows, k, columns);
    product.added = added;
    return choose_path(product, kIsaLimits<T>, forced) == Path::kRowBands;
}

// True if x W, for all columns of W, is best computed while W is packed ahead.
template <class T, class Weight>
inline bool prefers_ahead(const Weight& weight, int64_t expert, int64_t rows, int64_t k, int64_t columns,
                          std::optional<Path> forced) {
    if (weight.transposed) return false;
    Product product{};
    product.whole = true;
    product.has_format = weight.has_format();
    product.rows = rows;
    product.columns = columns;
    product.k = k;
    product.contiguous = weight.direct(expert) != nullptr;
    return choose_path(product, kIsaLimits<T>, forced) == Path::kPanelsAhead;
}

template <class T>
constexpr bool kPacksAhead = GemmScratch<T>::kPacksAhead;
template <class T>
constexpr bool kHasBands = GemmScratch<T>::kHasBands;

template <class T>
class BlockGemm {
    using C = Compute<T>;

public:
    // True if every block copies its rows of A, widened or as tiles.
    static constexpr bool kCopiesRows = MicroGemm<C>::kStaged || !std::is_same_v<T, C>;

    BlockGemm(const GemmScratch<T>& scratch, int64_t rows, int64_t columns) : block_{scratch, rows, columns} {}

    // C += A . W^T over the given rows of W.
    template <class Weight>
    void multiply_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        weight.transposed ? down_rows(a, k, weight, expert, columns) : along_rows(a, k, weight, expert, columns);
    }

    // C += A . W over the given columns of W.
    template <class Weight>
    void multiply_nn(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        weight.transposed ? along_rows(a, k, weight, expert, columns) : down_rows(a, k, weight, expert, columns);
    }

    // C += A . B with both operands in panels over the same k: row i of A is column i of its panels.
    void multiply_panels(const C* a, const C* b, int64_t k) {
        PanelGemm<T>(block_).multiply_panels(a, b, k);
        block_.adds = true;
    }

    // Call this after other code has written all of C.
    void holds_product() { block_.adds = true; }

    // Returns row i of the block, `columns` elements: zeros if nothing was multiplied.
    Acc<T>* row(int64_t i) {
        if (!block_.adds) {
            for (int64_t j = 0; j < block_.rows * block_.columns; ++j) block_.scratch.c[j] = 0;
            block_.adds = true;
        }
        return block_.row(i);
    }

private:
    // C += A . V^T over the given rows of V, the matrix in memory: W or W^T.
    template <class Weight>
    void along_rows(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        Path path = Path::kPanels;
        if constexpr (Weight::kDirect) {
            Product product = product_along_rows<T>(weight, expert, block_.rows, k, columns);
            product.columns = block_.columns;
            product.adds = block_.adds;
            path = take_path<T>(product, block_.scratch.forced);
            if (path == Path::kDots) dots(block_, a, k, weight, expert, columns);
            if constexpr (std::is_same_v<Acc<T>, float>) {
                if (path == Path::kDecodedDots) decoded_dots(block_, a, k, weight, expert, columns);
            }
            if constexpr (MicroGemm<C>::kReadsRows) {
                if (path == Path::kRowBands) row_bands(block_, a, k, weight, expert, columns);
            }
        }
        if (path == Path::kPanels) {
            T* decoded = block_.scratch.decoded_rows();
            PanelGemm<T>(block_).multiply(a, k, [&](int64_t k0, int64_t kn, C* panels, int64_t stride) {
                for_each_range(columns, int64_t{0}, [&](int64_t first, int64_t column) {
                    C* range = panels + column / kPanelColumns * stride;
                    weight.decode_nt(expert, first, columns.count, k0, kn, range, stride, decoded);
                });
            });
        }
        block_.adds = block_.adds || k > 0;
    }

    // C += A . V over the given columns of V.
    template <class Weight>
    void down_rows(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        Path path = Path::kPanels;
        if constexpr (Weight::kDirect) {
            Product product{};
            product.rows = block_.rows;
            product.columns = block_.columns;
            product.contiguous = weight.direct(expert) != nullptr;
            path = take_path<T>(product, block_.scratch.forced);
            if (path == Path::kColumnSums) column_sums(block_, a, k, weight, expert, columns);
        }
        if (path == Path::kPanels) {
            T* decoded = block_.scratch.decoded_rows();
            PanelGemm<T>(block_).multiply(a, k, [&](int64_t k0, int64_t kn, C* panels, int64_t stride) {
                for_each_range(columns, int64_t{0}, [&](int64_t first, int64_t column) {
                    C* range = panels + column / kPanelColumns * stride;
                    weight.decode_nn(expert, k0, kn, first, columns.count, range, stride, decoded);
                });
            });
        }
        block_.adds = block_.adds || k > 0;
    }

    Block<T> block_;
};

// Returns the most rows of a block with this many columns.
constexpr int64_t most_rows_of_block(int64_t columns) {
    return smaller(kMaxRows, kMaxRows * kMaxColumns / columns / kRowStep * kRowStep);
}

// Calls f(start, count) for blocks of about equal size: at most `most` rows and, except for the last block, a multiple
// of kRowStep.
template <class F>
inline void for_each_row_block(int64_t rows, F f, int64_t most = kMaxRows) {
    const int64_t size = round_up(ceil_div(rows, larger(1, ceil_div(rows, most))), kRowStep);
    for (int64_t i = 0; i < rows; i += size) f(i, smaller(size, rows - i));
}

}  // namespace kt::KT_ISA
