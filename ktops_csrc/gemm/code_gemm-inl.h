#pragma once

// C = A . W^T in integers: A as CodedRows, W in an integer format. The counterpart of BlockGemm::multiply_nt.

#include <numeric>

#include "gemm/block_gemm-inl.h"
#include "isa/micro_dots-inl.h"
#include "weights/weight-inl.h"

namespace kt::KT_ISA {

template <class T>
class CodeTiles;  // gemm/code_tiles-inl.h, on an ISA with tiles of bytes

template <class T>
class CodeGemm {
public:
    // Row i of A, i < m <= kMaxRows, is row index[i] of x, or first + i without an index.
    CodeGemm(const GemmScratch<T>& scratch, const Weight<T>& weight, int64_t expert, const CodedRows& x,
             const int32_t* index, int64_t first, int64_t m, const NextRows& after)
        : scratch_(scratch),
          w_(weight.tensor()),
          table_(weight.table()),
          e_(expert),
          x_(x),
          group_(x.group),
          unit_(weight.table().code_columns),
          m_(m),
          after_(after) {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t d = 0; d < x.digits; ++d) {
                index_[i * x.digits + d] = (index ? index[i] : first + i) * x.digits + d;
            }
        }
    }

    // Writes rows [0, m) of scratch.c: products with the rows of W in `columns`.
    void multiply(Path path, const Columns& columns) {
        ldc_ = columns.total();
        if (path == Path::kCodePanels) panels(columns);
        if (path == Path::kCodeDots) {
            for_each_range(columns, scratch_.c, [&](int64_t row, float* c) { dots(row, columns.count, c); });
        }
        if constexpr (Isa::kInt8Tiles) {
            if (path == Path::kCodeTiles) CodeTiles<T>(scratch_, w_, table_, e_, x_, index_, m_).multiply(columns);
        }
    }

private:
    static constexpr int64_t kBlockColumns = MicroDots::kPanels * kPanelColumns;
    static constexpr int64_t kMaxGroups = kMaxK / 16 + 2;
    // Scratch for one block: its panels, and the scale and min of every group and column.
    static constexpr int64_t kScales = 2 * kMaxGroups * kBlockColumns;
    static_assert(MicroDots::kPanels * code_panel_stride(kMaxK) <= kPanelBytes);
    static_assert(kScales * 4 <= kRowBytes);

    float* scales() const { return scratch_.code_scales(); }

    void dots(int64_t row, int64_t n, float* c) const {
        const int64_t few = table_.few_rows, m = m_ * x_.digits, ldc = ldc_;
        const int64_t most = m > few ? 64 : n;  // rows of W that stay in cache for all rows of A
        for (int64_t j = 0; j < n; j += most) {
            for (int64_t i = 0; i < m; i += few) {
                table_.code_dots(w_, e_, row + j, smaller(most, n - j), x_, index_ + i, smaller(few, m - i),
                                 c + i * ldc + j, ldc);
            }
        }
        if (x_.digits == 1) return;
        for (int64_t i = 0; i < m_; ++i) {
            const float *high = c + 2 * i * ldc, *low = high + ldc;
            for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = high[j] + low[j];
        }
    }

    // Columns [k, k + kn).
    struct Block {
        int64_t k, kn, blocks, groups;
    };

    // k is split into blocks of whole units, and of whole groups if they fit.
    void panels(const Columns& columns) {
        const int64_t padded = round_up(w_.columns, unit_), groups = std::lcm(smaller(group_, padded), unit_);
        const int64_t step = groups <= kMaxK ? groups : unit_, most = kMaxK / step * step;
        for (int64_t k = 0; k < padded; k += most) {
            const int64_t kn = smaller(most, padded - k), end = smaller(k + kn, w_.columns);
            const Block block{k, kn, ceil_div(end - k, CodedRows::kBlock), (end - 1) / group_ - k / group_ + 1};
            for (int64_t i = 0; i < m_; ++i) a_[i] = x_.row(index_[i]) + k;
            const NextRows after = k + kn < padded ? NextRows{} : after_;
            const bool both = columns.second >= 0;
            panel_block(block, columns.first, columns.count, both ? NextRows{e_, columns.second} : after, 0);
            if (both) panel_block(block, columns.second, columns.count, after, columns.padded());
        }
    }

    // Products with rows [row, row + n) of W, over the columns of `block`, for columns of C from `column` on. Packs and
    // uses a few panels at a time, and meanwhile prefetches the codes of the next ones; at the end, those of `after`.
    void panel_block(const Block& block, int64_t row, int64_t n, const NextRows& after, int64_t column) const {
        for (int64_t j = 0; j < n; j += kBlockColumns) {
            const int64_t count = smaller(kBlockColumns, n - j), next = j + kBlockColumns;
            make_panels(block, row + j, count);
            multiply_panels(block, count, column + j, next < n ? NextRows{e_, row + next} : after);
        }
    }

    // Bytes of a row of W in the block.
    int64_t block_bytes(const Block& block) const {
        return ceil_div(w_.row_bytes * block.kn, round_up(w_.columns, unit_));
    }

    void make_panels(const Block& block, int64_t row, int64_t n) const {
        uint8_t* panels = scratch_.code_panels();
        const int64_t first = block.k / group_;
        // With few rows, the micro-kernel has too few steps to prefetch all codes of the next panels.
        const int64_t lines = ceil_div(m_, MicroDots::kRows) * block.kn / MicroDots::kCodesALine;
        const int64_t ahead = lines * 64 < n * block_bytes(block) ? kPanelColumns * w_.row_bytes : 0;
        for (int64_t j = 0; j < n; j += kPanelColumns, panels += code_panel_stride(block.kn)) {
            const int64_t count = smaller(kPanelColumns, n - j);
            table_.code_panel(w_, e_, row + j, count, block.k, block.kn, panels, ahead);
            table_.code_scales(w_, e_, row + j, count, first, block.groups, scales() + j, scales() + kBlockColumns + j,
                               2 * kBlockColumns);
        }
    }

    void multiply_panels(const Block& block, int64_t n, int64_t column, const NextRows& next) const {
        const int panels = static_cast<int>(ceil_div(n, kPanelColumns));
        // Offset from column k of a row to its numbers for that column: one number of `bytes` bytes per `columns`.
        const auto at = [&](int64_t first, int64_t columns, int64_t bytes) {
            return first + block.k / columns * bytes - block.k;
        };
        ReadAhead ahead(w_, next, n, block.k, block_bytes(block), ceil_div(m_, MicroDots::kRows));
        CodeArguments g;
        g.a_scales = at(x_.scales_at, CodedRows::kBlock, 4);
        g.starts = at(x_.starts_at, x_.part, 4);
        g.sums = at(x_.sums_at, group_, 4);
        g.joined = at(x_.joined_at, CodedRows::kUnit, 1);
        g.joins = x_.joins();
        g.pairs = x_.pairs;
        g.pairs_in_word = table_.pairs_in_word;
        g.blocks = block.blocks;
        g.group = group_;
        g.first_blocks = (group_ - block.k % group_) / CodedRows::kBlock;
        g.begins = block.k % group_ == 0;
        g.scales = scales();
        g.mins = table_.code_mins ? scales() + kBlockColumns : nullptr;
        g.w_stride = 2 * kBlockColumns;
        g.panels = panels;
        g.b = scratch_.code_panels();
        g.b_stride = code_panel_stride(block.kn);
        g.adds = block.k > 0;
        g.ldc = ldc_;
        g.ahead_step = ahead.step;
        for (int64_t i = 0; i < m_; i += MicroDots::kRows) {
            g.m = static_cast<int>(smaller(MicroDots::kRows, m_ - i));
            g.a = a_ + i;
            g.c = scratch_.c + i * ldc_ + column;
            g.ahead = ahead.call();
            MicroDots::multiply(g);
        }
    }

    // Spreads prefetches over `calls` calls: `bytes` bytes, from column k on, of each of the n rows from `next` on.
    // The constructor prefetches their scales.
    class ReadAhead {
    public:
        ReadAhead(const WeightTensor& w, const NextRows& next, int64_t n, int64_t k, int64_t bytes, int64_t calls)
            : step(next.expert < 0 ? 0 : kLine),
              lines_(ceil_div(bytes, kLine)),
              lines_a_call_(ceil_div(n * lines_, calls)),
              row_bytes_(step ? w.row_bytes : 0),
              row_(w.row(larger(next.expert, 0), next.row) + w.row_bytes * k / w.columns) {
            if (step) prefetch(w.scale, next, n), prefetch(w.zero, next, n);
        }

        // Returns the address at which the next call prefetches, `step` bytes at a time.
        const uint8_t* call() {
            const uint8_t* at = row_ + line_ * step;
            for (line_ += lines_a_call_; line_ >= lines_; line_ -= lines_) row_ += row_bytes_;
            return at;
        }

        const int64_t step;

    private:
        static constexpr int64_t kLine = 64;

        // Always inline: GCC drops calls to a function that only prefetches.
        __attribute__((always_inline)) static void prefetch(const GroupValues& values, const NextRows& next,
                                                            int64_t n) {
            if (!values.data) return;
            const uint8_t* from = values.at(next.expert, next.row);
            for (int64_t i = 0; i < n * values.row_stride * values.element_bytes(); i += kLine) {
                __builtin_prefetch(from + i, 0, 2);
            }
        }

        int64_t lines_, lines_a_call_, row_bytes_, line_ = 0;
        const uint8_t* row_;
    };

    const GemmScratch<T>& scratch_;
    const WeightTensor& w_;
    const FormatTable& table_;
    int64_t e_;
    const CodedRows& x_;
    int64_t group_, unit_, m_, ldc_ = 0;
    NextRows after_;
    int64_t index_[2 * kMaxRows];
    const int8_t* a_[kMaxRows];
};

// Computes C = A . W^T for a block, with rows of x as A; see CodeGemm.
template <class T>
inline void multiply_codes(BlockGemm<T>& block, const GemmScratch<T>& scratch, const Weight<T>& weight, int64_t expert,
                           const CodedRows& x, const int32_t* index, int64_t first, int64_t m, const Columns& columns,
                           const NextRows& after) {
    if constexpr (std::is_same_v<Acc<T>, float>) {
        Product product{};
        product.along_rows = true;
        product.rows = m;
        product.columns = columns.total();
        product.digits = x.digits;
        const Path path = take_path<T>(product, scratch.forced);
        CodeGemm<T>(scratch, weight, expert, x, index, first, m, after).multiply(path, columns);
        block.holds_product();
    }
}

}  // namespace kt::KT_ISA
