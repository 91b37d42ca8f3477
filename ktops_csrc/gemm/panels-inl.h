#pragma once

// Products with panels: kPanels, and products of two matrices whose common dimension is the positions of an expert.
//
//   k is split into blocks. The panels of a block of B (kPanelBytes, sized for L2) are packed once for all rows.
//   The order in which an element of C is summed depends only on the number of rows and on k, so results do not depend
//   on how the work is divided.

#include "gemm/scratch-inl.h"

namespace kt::KT_ISA {

template <class T>
class PanelGemm {
    using C = Compute<T>;
    using Micro = MicroGemm<C>;
    static_assert(Micro::kRows <= kRowStep);
    static constexpr int64_t P = kPack<C>;

public:
    explicit PanelGemm(const Block<T>& block) : scratch_(block.scratch), block_(block) {}

    // C (+)= A . B, where decode(k0, kn, panels, stride) packs B.
    template <class Decode>
    void multiply(const Rows<T>& a, int64_t k, Decode decode) {
        const int64_t most = smaller(kMaxK, GemmScratch<T>::kPanelElements / block_.columns / 32 * 32);
        const int64_t k_block = round_up(ceil_div(k, larger(1, ceil_div(k, most))), 32);
        for (int64_t k0 = 0; k0 < k; k0 += k_block, block_.adds = true) {
            const int64_t kn = smaller(k_block, k - k0), stride = panel_elements<C>(kn) + GemmScratch<T>::kPadding;
            decode(k0, kn, scratch_.panels, stride);
            for (int64_t i = 0; i < block_.rows; i += Micro::kRows) {
                const int64_t m = smaller(Micro::kRows, block_.rows - i);
                const T* rows[Micro::kRows];
                for (int64_t j = 0; j < m; ++j) rows[j] = a.row(i + j) + k0;
                multiply_rows(rows, m, kn, stride, i);
            }
        }
    }

    // C (+)= A . B with both operands in panels over the same k: row i of A is column i of its panels.
    void multiply_panels(const C* a, const C* b, int64_t k) const {
        const int64_t stride = panel_elements<C>(k);
        for (int64_t i = 0; i < block_.rows; i += Micro::kRows) {
            const int64_t m = smaller(Micro::kRows, block_.rows - i);
            const C* pointers[Micro::kRows];
            if constexpr (Micro::kStaged) {
                Micro::stage_panels(a, stride, i, m, scratch_.stage, pointers);
                micro(pointers, m, P, b, stride, k, i);
            } else {
                point_into_panels(a, stride, i, m, pointers);
                micro(pointers, m, P * kPanelColumns, b, stride, k, i);
            }
        }
    }

private:
    // Rows that the micro-kernel can't read in place are staged: those of another type, and those to be padded with
    // zeros.
    void multiply_rows(const T* const* rows, int64_t m, int64_t k, int64_t stride, int64_t i) const {
        const C* staged[Micro::kRows];
        if constexpr (Micro::kStaged) {
            Micro::stage(rows, m, k, scratch_.stage, staged);
        } else if constexpr (std::is_same_v<T, C>) {
            if (k % P == 0) return micro(rows, m, P, scratch_.panels, stride, k, i);
            stage_rows(rows, m, k, scratch_.stage, staged);
        } else {
            stage_rows(rows, m, k, scratch_.stage, staged);
        }
        micro(staged, m, P, scratch_.panels, stride, k, i);
    }

    void micro(const C* const* a, int64_t m, int64_t a_step, const C* b, int64_t b_stride, int64_t k, int64_t i) const {
        const int64_t k_steps = round_up(k, kKMultiple<C>) / P, columns = block_.columns;
        const int64_t most = Micro::panels(m);
        for (int64_t p = 0; p < columns / kPanelColumns; p += most) {
            const int64_t panels = smaller(most, columns / kPanelColumns - p);
            Micro::gemm({static_cast<int>(m), static_cast<int>(panels), a, a_step, b + p * b_stride, b_stride, k_steps,
                         block_.row(i) + p * kPanelColumns, columns, block_.adds});
        }
    }

    const GemmScratch<T>& scratch_;
    Block<T> block_;
};

}  // namespace kt::KT_ISA
