#pragma once

// One block of C = A . B held in a thread's scratch: at most kMaxRows rows, kMaxColumns columns, any k.
//
//   k is walked in blocks: a panel block of B (kPanelBytes, sized for L2) is decoded once and used by every row.
//   Each element of C is summed in the order of k whatever the shape of the block, so results do not depend on how
//   the work is cut.

#include "core/workspace.h"
#include "isa/micro_gemm_generic-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kMaxRows = 512;
constexpr int64_t kMaxColumns = 128;
constexpr int64_t kPanelBytes = 512 << 10;

// Up to two ranges of columns of B, one after the other: the gate and the up half of gate_up_proj.
struct Columns {
    int64_t first, count;
    int64_t second = -1;

    int64_t padded() const { return round_up(count, kPanelColumns); }
    int64_t total() const { return (second < 0 ? 1 : 2) * padded(); }
};

template <class T>
struct GemmScratch {
    static constexpr int64_t kMaxK = kPanelBytes / (kMaxColumns * static_cast<int64_t>(sizeof(T)));

    T* panels;
    T* left;  // panels of A for products of two row-major operands
    Acc<T>* c;

    static size_t bytes() {
        return Workspace::padded<T>(kMaxK * kMaxColumns) + Workspace::padded<T>(kLeftElements) +
               Workspace::padded<Acc<T>>(kMaxRows * kMaxColumns);
    }
    explicit GemmScratch(Workspace& workspace)
        : panels(workspace.take<T>(kMaxK * kMaxColumns)),
          left(workspace.take<T>(kLeftElements)),
          c(workspace.take<Acc<T>>(kMaxRows * kMaxColumns)) {}

    static constexpr int64_t kLeftElements = (256 << 10) / static_cast<int64_t>(sizeof(T));
};

template <class T>
class BlockGemm {
public:
    BlockGemm(const GemmScratch<T>& scratch, int64_t rows, int64_t columns)
        : scratch_(scratch), rows_(rows), columns_(columns) {}

    // C += A . W^T over the given rows of W.
    template <class Weight>
    void multiply_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        if constexpr (Weight::kDirect && MicroGemm<T>::kDirectRows > 0) {
            const T* w = weight.direct(expert);
            if (first_ && rows_ <= MicroGemm<T>::kDirectRows && w) {
                return multiply_direct(a, k, w, weight.row_stride, columns);
            }
        }
        multiply(a, k, [&](int64_t k0, int64_t kn, T* panels, int64_t stride) {
            weight.decode_nt(expert, columns.first, columns.count, k0, kn, panels, stride);
            if (columns.second >= 0) {
                T* second = panels + columns.padded() / kPanelColumns * stride;
                weight.decode_nt(expert, columns.second, columns.count, k0, kn, second, stride);
            }
        });
    }

    // C += A . W over the given columns of W.
    template <class Weight>
    void multiply_nn(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        multiply(a, k, [&](int64_t k0, int64_t kn, T* panels, int64_t stride) {
            weight.decode_nn(expert, k0, kn, columns.first, columns.count, panels, stride);
        });
    }

    // C += A . B with B given by decode(k0, kn, panels, stride).
    template <class Decode>
    void multiply(const Rows<T>& a, int64_t k, Decode decode) {
        constexpr int64_t P = kPack<T>;
        for (int64_t k0 = 0; k0 < k; k0 += GemmScratch<T>::kMaxK) {
            const int64_t kn = smaller(GemmScratch<T>::kMaxK, k - k0), whole = kn / P;
            const int64_t stride = round_up(kn, P) * kPanelColumns;
            decode(k0, kn, scratch_.panels, stride);
            for (int64_t i = 0; i < rows_; i += MicroGemm<T>::kRows) {
                const int64_t m = smaller(MicroGemm<T>::kRows, rows_ - i);
                const T* pointers[MicroGemm<T>::kRows];
                for (int64_t j = 0; j < m; ++j) pointers[j] = a.row(i + j) + k0;
                if (whole) micro(pointers, m, P, scratch_.panels, stride, whole, i);
                if (kn % P)
                    multiply_tail(pointers, m, kn - 1, scratch_.panels + whole * P * kPanelColumns, stride, i,
                                  whole == 0);
            }
            first_ = false;
        }
    }

    // C += A . B with both operands in panels over the same k_steps: row i of A is column i of its panels.
    void multiply_panels(const T* a, const T* b, int64_t k_steps) {
        constexpr int64_t step = kPack<T> * kPanelColumns;
        for (int64_t i = 0; i < rows_; i += MicroGemm<T>::kRows) {
            const int64_t m = smaller(MicroGemm<T>::kRows, rows_ - i);
            const T* pointers[MicroGemm<T>::kRows];
            for (int64_t j = 0; j < m; ++j) {
                pointers[j] = a + (i + j) / kPanelColumns * k_steps * step + (i + j) % kPanelColumns * kPack<T>;
            }
            micro(pointers, m, step, b, k_steps * step, k_steps, i);
        }
        first_ = false;
    }

    // The block: row i, with `columns` columns. Zero if nothing was multiplied.
    Acc<T>* row(int64_t i) {
        if (first_) {
            for (int64_t j = 0; j < rows_ * columns_; ++j) scratch_.c[j] = 0;
            first_ = false;
        }
        return scratch_.c + i * columns_;
    }

private:
    void micro(const T* const* a, int64_t m, int64_t a_step, const T* b, int64_t b_stride, int64_t k_steps, int64_t i) {
        for (int64_t p = 0; p < columns_ / kPanelColumns; p += MicroGemm<T>::kPanels) {
            const int64_t panels = smaller(MicroGemm<T>::kPanels, columns_ / kPanelColumns - p);
            MicroGemm<T>::gemm({static_cast<int>(m), static_cast<int>(panels), a, a_step, b + p * b_stride, b_stride,
                                k_steps, scratch_.c + i * columns_ + p * kPanelColumns, columns_, !first_});
        }
    }

    // The last element of an odd k: a pair with zero, so that nothing beyond the row is read.
    void multiply_tail(const T* const* a, int64_t m, int64_t k, const T* b, int64_t stride, int64_t i, bool alone) {
        constexpr int64_t P = kPack<T>;
        T tail[MicroGemm<T>::kRows][P] = {};
        const T* pointers[MicroGemm<T>::kRows];
        for (int64_t j = 0; j < m; ++j) {
            tail[j][0] = read(a[j] + k);
            pointers[j] = tail[j];
        }
        const bool first = first_;
        first_ = first_ && alone;
        micro(pointers, m, P, b, stride, 1, i);
        first_ = first;
    }

    void multiply_direct(const Rows<T>& a, int64_t k, const T* w, int64_t stride, const Columns& columns) {
        const T* pointers[MicroGemm<T>::kDirectRows];
        for (int64_t i = 0; i < rows_; ++i) pointers[i] = a.row(i);
        MicroGemm<T>::direct(pointers, rows_, w + columns.first * stride, stride, columns.count, k, scratch_.c,
                             columns_);
        if (columns.second >= 0) {
            MicroGemm<T>::direct(pointers, rows_, w + columns.second * stride, stride, columns.count, k,
                                 scratch_.c + columns.padded(), columns_);
        }
        first_ = false;
    }

    const GemmScratch<T>& scratch_;
    int64_t rows_, columns_;
    bool first_ = true;
};

// f(start, count) for pieces of at most kMaxRows rows.
template <class F>
inline void for_each_row_block(int64_t rows, F f) {
    for (int64_t i = 0; i < rows; i += kMaxRows) f(i, smaller(kMaxRows, rows - i));
}

}  // namespace kt::KT_ISA
