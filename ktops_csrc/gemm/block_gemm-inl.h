#pragma once

// One block of C = A . B held in a thread's scratch: at most kMaxRows rows and kMaxColumns columns, or fewer rows, in
// steps of kRowStep, and up to kWideColumns columns; any k.
//
//   k is walked in blocks: a panel block of B (kPanelBytes, sized for L2) is decoded once and used by every row.
//   The order in which an element of C is summed depends on the number of rows and on k alone, so results do not depend
//   on how the work is cut.

#include "core/workspace.h"
#include "isa/direct-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kMaxRows = 256;
constexpr int64_t kMaxColumns = 256;
constexpr int64_t kMaxK = 2048;
constexpr int64_t kRowStep = 32;        // a micro-kernel may write as many rows, with fewer to compute
constexpr int64_t kWideColumns = 2048;  // of a block with few rows
constexpr int64_t kPanelBytes = 512 << 10;

// Up to this many rows of A, B is multiplied where it lies: a panel would not be used often enough to pay for itself.
template <class T>
constexpr int64_t kDirectRows = std::is_same_v<T, bfloat16> ? Isa::kBFloat16DirectRows : 32;

// Up to this many rows, dot products are faster than a micro-kernel that reads rows of B where they lie.
constexpr int64_t kDotOnlyRows = 4;

// Up to two ranges of columns of B, one after the other: the gate and the up half of gate_up_proj.
struct Columns {
    int64_t first, count;
    int64_t second = -1;

    int64_t padded() const { return round_up(count, kPanelColumns); }
    int64_t total() const { return (second < 0 ? 1 : 2) * padded(); }
};

template <class T>
struct GemmScratch {
    using C = Compute<T>;
    static constexpr int64_t kPanelElements = kPanelBytes / static_cast<int64_t>(sizeof(C));
    // Between panels, so that they don't start a power of two apart: their lines would share a few sets of the cache.
    static constexpr int64_t kPadding = 64 / static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kPaddedElements = kPanelElements + kWideColumns / kPanelColumns * kPadding;
    static constexpr int64_t kLeftElements = kPanelElements / 2;
    static constexpr int64_t kStageElements = MicroGemm<C>::kRows * staged_row_stride<C>(kMaxK);

    C* panels;
    C* left;   // panels of A for products of two row-major operands
    C* stage;  // rows of A, where the micro-kernel can't read them as they lie
    Acc<T>* c;

    explicit GemmScratch(Workspace& workspace)
        : panels(workspace.take<C>(kPaddedElements)),
          left(workspace.take<C>(kLeftElements)),
          stage(workspace.take<C>(kStageElements)),
          c(workspace.take<Acc<T>>(kMaxRows * kMaxColumns)) {}
};

template <class T>
class BlockGemm {
    using C = Compute<T>;
    using Micro = MicroGemm<C>;
    static_assert(Micro::kRows <= kRowStep);
    static constexpr int64_t P = kPack<C>;
    static constexpr int64_t kRowsAhead = Direct<T>::kRowsAhead;
    static constexpr int64_t kElementBytes = static_cast<int64_t>(sizeof(T)), kScratchPadding = 64 / kElementBytes;
    static constexpr int64_t kScratchElements = kPanelBytes / kElementBytes;
    static constexpr int64_t kLeftBytes = GemmScratch<T>::kLeftElements * static_cast<int64_t>(sizeof(C));

public:
    // Whether the rows of A are widened, or put into tiles, for every block.
    static constexpr bool kCopiesRows = Micro::kStaged || !std::is_same_v<T, C>;

    BlockGemm(const GemmScratch<T>& scratch, int64_t rows, int64_t columns)
        : scratch_(scratch), rows_(rows), columns_(columns) {}

    // C += A . W^T over the given rows of W.
    template <class Weight>
    void multiply_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        if constexpr (Weight::kDirect) {
            if (first_ && rows_ <= weight.few_rows() && few_nt(a, k, weight, expert, columns)) return;
            if constexpr (Micro::kReadsRows) {
                if (first_ && rows_ > kDotOnlyRows && rows_nt(a, k, weight, expert, columns)) return;
            }
            if (first_ && rows_ <= kDirectRows<T> && kDotRows * k <= kScratchElements) {
                direct_nt(a, k, weight, expert, columns.first, columns.count, scratch_.c);
                if (columns.second >= 0) {
                    direct_nt(a, k, weight, expert, columns.second, columns.count, scratch_.c + columns.padded());
                }
                first_ = false;
                return;
            }
        }
        multiply(a, k, [&](int64_t k0, int64_t kn, C* panels, int64_t stride) {
            weight.decode_nt(expert, columns.first, columns.count, k0, kn, panels, stride, scratch());
            if (columns.second >= 0) {
                C* second = panels + columns.padded() / kPanelColumns * stride;
                weight.decode_nt(expert, columns.second, columns.count, k0, kn, second, stride, scratch());
            }
        });
    }

    // C += A . W over the given columns of W.
    template <class Weight>
    void multiply_nn(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        if constexpr (Weight::kDirect) {
            if (rows_ <= kDirectRows<T>) return direct_nn(a, k, weight, expert, columns);
        }
        multiply(a, k, [&](int64_t k0, int64_t kn, C* panels, int64_t stride) {
            weight.decode_nn(expert, k0, kn, columns.first, columns.count, panels, stride, scratch());
        });
    }

    // C += A . B with B given by decode(k0, kn, panels, stride).
    template <class Decode>
    void multiply(const Rows<T>& a, int64_t k, Decode decode) {
        const int64_t most = smaller(kMaxK, GemmScratch<T>::kPanelElements / columns_ / 32 * 32);
        const int64_t k_block = round_up(ceil_div(k, larger(1, ceil_div(k, most))), 32);
        for (int64_t k0 = 0; k0 < k; k0 += k_block) {
            const int64_t kn = smaller(k_block, k - k0), stride = panel_elements<C>(kn) + GemmScratch<T>::kPadding;
            decode(k0, kn, scratch_.panels, stride);
            for (int64_t i = 0; i < rows_; i += Micro::kRows) {
                const int64_t m = smaller(Micro::kRows, rows_ - i);
                const T* rows[Micro::kRows];
                for (int64_t j = 0; j < m; ++j) rows[j] = a.row(i + j) + k0;
                multiply_rows(rows, m, kn, stride, i);
            }
            first_ = false;
        }
    }

    // C += A . B with both operands in panels over the same k: row i of A is column i of its panels.
    void multiply_panels(const C* a, const C* b, int64_t k) {
        const int64_t stride = panel_elements<C>(k);
        for (int64_t i = 0; i < rows_; i += Micro::kRows) {
            const int64_t m = smaller(Micro::kRows, rows_ - i);
            const C* pointers[Micro::kRows];
            if constexpr (Micro::kStaged) {
                Micro::stage_panels(a, stride, i, m, scratch_.stage, pointers);
                micro(pointers, m, P, b, stride, k, i);
            } else {
                point_into_panels(a, stride, i, m, pointers);
                micro(pointers, m, P * kPanelColumns, b, stride, k, i);
            }
        }
        first_ = false;
    }

    // Somebody else has written all of C.
    void holds_product() { first_ = false; }

    // The block: row i, with `columns` columns. Zero if nothing was multiplied.
    Acc<T>* row(int64_t i) {
        if (first_) {
            for (int64_t j = 0; j < rows_ * columns_; ++j) scratch_.c[j] = 0;
            first_ = false;
        }
        return scratch_.c + i * columns_;
    }

private:
    // Rows that the micro-kernel can't read as they lie are staged: of another type, or with an end that needs zeros.
    void multiply_rows(const T* const* rows, int64_t m, int64_t k, int64_t stride, int64_t i) {
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

    void micro(const C* const* a, int64_t m, int64_t a_step, const C* b, int64_t b_stride, int64_t k, int64_t i) {
        const int64_t k_steps = round_up(k, kKMultiple<C>) / P;
        const int64_t most = Micro::panels(m);
        for (int64_t p = 0; p < columns_ / kPanelColumns; p += most) {
            const int64_t panels = smaller(most, columns_ / kPanelColumns - p);
            Micro::gemm({static_cast<int>(m), static_cast<int>(panels), a, a_step, b + p * b_stride, b_stride, k_steps,
                         scratch_.c + i * columns_ + p * kPanelColumns, columns_, !first_});
        }
    }

    // Space for rows of a weight that are decoded: kLeftElements of C.
    T* scratch() const { return reinterpret_cast<T*>(scratch_.left); }

    // C = A . W^T for a weight in a format, each code used as it is decoded. False if the rows of A have no space.
    template <class Weight>
    bool few_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        if constexpr (std::is_same_v<Acc<T>, float>) {
            const int64_t stride = round_up(k, kChunk);
            if (rows_ * stride * static_cast<int64_t>(sizeof(float)) > kLeftBytes) return false;
            const float* x[kRowStep];
            auto* ordered = reinterpret_cast<float*>(scratch_.left);
            for (int64_t i = 0; i < rows_; ++i, ordered += stride) {
                weight.order_row(a.row(i), ordered);
                x[i] = ordered;
            }
            weight.dots(expert, columns.first, columns.count, x, rows_, scratch_.c, columns_);
            if (columns.second >= 0) {
                weight.dots(expert, columns.second, columns.count, x, rows_, scratch_.c + columns.padded(), columns_);
            }
            first_ = false;
            return true;
        } else {
            return false;
        }
    }

    // C = A . W^T, not added to what C holds. Weights whose rows are not contiguous are copied, as many rows at once as
    // the space for panels holds.
    template <class Weight>
    void direct_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, int64_t row, int64_t n,
                   Acc<T>* c) {
        const T* rows[kDirectRows<T>];
        for (int64_t i = 0; i < rows_; ++i) rows[i] = a.row(i);
        const T* w = weight.direct(expert);
        if (w) return Direct<T>::dots(rows, rows_, w + row * weight.row_stride, weight.row_stride, n, k, c, columns_);
        T* copy = reinterpret_cast<T*>(scratch_.panels);
        const int64_t most = kScratchElements / larger(k, 1) / kDotRows * kDotRows;
        for (int64_t j = 0; j < n; j += most) {
            const int64_t count = smaller(most, n - j);
            weight.copy_rows(expert, row + j, count, 0, k, copy);
            Direct<T>::dots(rows, rows_, copy, k, count, k, c + j, columns_);
        }
    }

    // C = A . W^T with rows of W as tiles, where they lie or as they are decoded, and A in panels. False if the rows of
    // W don't allow it: for a weight of one shape it is always the same.
    template <class Weight>
    bool rows_nt(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        const T* w = weight.direct(expert);
        const int64_t most = smaller(kMaxRows, GemmScratch<T>::kPanelElements / larger(k, 1) / kRowStep * kRowStep);
        if (k % kKMultiple<C> || columns.first + columns.count < kPanelColumns || most == 0) return false;
        // Decoded rows are not a power of two apart: their lines would share a few sets of the cache.
        const int64_t apart = k + kScratchPadding, decoded = kLeftBytes / kElementBytes / apart / kRowStep * kRowStep;
        if (!w && (decoded == 0 || !weight.has_format())) return false;
        const int64_t stride = panel_elements<C>(k);
        for (int64_t i = 0; i < rows_; i += most) {
            const int64_t m = smaller(most, rows_ - i);
            for (int64_t j = 0; j < m; j += kPanelColumns) {
                pack_rows(a, i + j, smaller(kPanelColumns, m - j), k, scratch_.panels + j / kPanelColumns * stride);
            }
            const auto multiply = [&](int64_t row, Acc<T>* c) {
                if (w) return tiles_nt(w + row * weight.row_stride, weight.row_stride, columns.count, m, k, c);
                for (int64_t j = 0; j < columns.count; j += decoded) {
                    const int64_t n = smaller(decoded, columns.count - j), before = larger(0, kPanelColumns - n);
                    weight.decode_rows(expert, row + j - before, before + n, 0, k, scratch(), apart);
                    tiles_nt(scratch() + before * apart, apart, n, m, k, c + j);
                }
            };
            multiply(columns.first, scratch_.c + i * columns_);
            if (columns.second >= 0) multiply(columns.second, scratch_.c + i * columns_ + columns.padded());
        }
        first_ = false;
        return true;
    }

    void tiles_nt(const T* w, int64_t row_stride, int64_t n, int64_t m, int64_t k, Acc<T>* c) const {
        Micro::multiply_rows(w, row_stride, n, scratch_.panels, panel_elements<C>(k), m, k, c, columns_);
    }

    template <class Weight>
    void direct_nn(const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert, const Columns& columns) {
        const T* w = weight.direct(expert);
        T* copy = reinterpret_cast<T*>(scratch_.panels);
        const int64_t most = w ? k : kScratchElements / columns.count / kRowsAhead * kRowsAhead;
        for (int64_t k0 = 0; k0 < k; k0 += most) {
            const T* rows[kDirectRows<T>];
            for (int64_t i = 0; i < rows_; ++i) rows[i] = a.row(i) + k0;
            const int64_t kn = smaller(most, k - k0);
            if (!w) weight.copy_rows(expert, k0, kn, columns.first, columns.count, copy);
            Direct<T>::columns(rows, rows_, w ? w + columns.first : copy, w ? weight.row_stride : columns.count,
                               columns.count, kn, scratch_.c, columns_, !first_);
            first_ = false;
        }
    }

    const GemmScratch<T>& scratch_;
    int64_t rows_, columns_;
    bool first_ = true;
};

// f(start, count) for pieces of at most `most` rows, a multiple of kRowStep, about as many in each.
template <class F>
inline void for_each_row_block(int64_t rows, F f, int64_t most = kMaxRows) {
    const int64_t size = round_up(ceil_div(rows, larger(1, ceil_div(rows, most))), kRowStep);
    for (int64_t i = 0; i < rows; i += size) f(i, smaller(size, rows - i));
}

}  // namespace kt::KT_ISA
