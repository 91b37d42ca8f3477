#pragma once

// C = A . W^T in integers: A as CodedRows, W in an integer format. What BlockGemm::multiply_nt is to floats.

#include <numeric>

#include "gemm/block_gemm-inl.h"
#include "isa/micro_dots-inl.h"

#ifdef KT_INT8_TILES
#include "gemm/code_tiles-inl.h"
#endif

namespace kt::KT_ISA {

// Up to this many rows, codes are multiplied where they lie; a panel would not be used often enough.
constexpr int64_t kCodeDotRows = 8;

template <class T>
class CodeGemm {
public:
    // Row i of A, i < m <= kMaxRows, is row index[i] of x, or first + i without an index.
    CodeGemm(const GemmScratch<T>& scratch, const Weight<T>& weight, int64_t expert, const CodedRows& x,
             const int32_t* index, int64_t first, int64_t m)
        : scratch_(scratch),
          w_(weight.tensor()),
          table_(weight.table()),
          e_(expert),
          x_(x),
          group_(x.group),
          unit_(weight.table().code_columns),
          m_(m) {
        for (int64_t i = 0; i < m; ++i) index_[i] = index ? index[i] : first + i;
    }

    // Writes rows [0, m) of scratch.c: products with the rows of W that `columns` names.
    void multiply(const Columns& columns) {
        const int64_t ldc = ldc_ = columns.total();
        float* c = scratch_.c;
        if (m_ <= kCodeDotRows) {
            dots(columns.first, columns.count, c, ldc);
            if (columns.second >= 0) dots(columns.second, columns.count, c + columns.padded(), ldc);
            return;
        }
#ifdef KT_INT8_TILES
        if (CodeTiles<T>::fits(w_, table_, group_)) {
            return CodeTiles<T>(scratch_, w_, table_, e_, x_, index_, m_).multiply(columns);
        }
#endif
        panels(columns);
        for (int64_t i = 0; i < m_; ++i) {
            float* row = c + i * ldc;
            for_each_vector<float>(
                ldc, [&](int64_t j, int64_t n) { store_n(row + j, load_n(row + j, n) * x_.scale[index_[i]], n); });
        }
    }

private:
    static constexpr int64_t kBlockColumns = MicroDots::kPanels * kPanelColumns;
    static constexpr int64_t kMaxGroups = kMaxK / 16 + 2, kMaxSegments = 2 * kMaxGroups;
    // What a block keeps in scratch: scale and min of every group and column; its panels; 16 rows of codes.
    static constexpr int64_t kLeftBytes = GemmScratch<T>::kLeftElements * static_cast<int64_t>(sizeof(Compute<T>));
    static constexpr int64_t kScaleBytes = 2 * kMaxGroups * kBlockColumns * static_cast<int64_t>(sizeof(float));
    static_assert(MicroDots::kPanels * code_panel_stride(kMaxK) <= kPanelBytes);
    static_assert(kPanelColumns * code_row_stride(kMaxK) + kScaleBytes <= kLeftBytes);

    void dots(int64_t row, int64_t n, float* c, int64_t ldc) const {
        const int64_t few = table_.few_rows;
        const int64_t strip = m_ > few ? 64 : n;  // rows of W that stay in cache for all rows of A
        for (int64_t j = 0; j < n; j += strip) {
            for (int64_t i = 0; i < m_; i += few) {
                table_.code_dots(w_, e_, row + j, smaller(strip, n - j), x_, index_ + i, smaller(few, m_ - i),
                                 c + i * ldc + j, ldc);
            }
        }
    }

    // k is walked in blocks of whole units, of whole groups at best.
    void panels(const Columns& columns) const {
        const int64_t padded = round_up(w_.columns, unit_), groups = std::lcm(smaller(group_, padded), unit_);
        const int64_t step = groups <= kMaxK ? groups : unit_, block = kMaxK / step * step;
        for (int64_t k = 0; k < padded; k += block) {
            const int64_t kn = smaller(block, padded - k);
            panel_block(columns.first, columns.count, columns.second, 0, k, kn);
            if (columns.second >= 0) panel_block(columns.second, columns.count, -1, columns.padded(), k, kn);
        }
    }

    // Products with rows [row, row + n) of W, over k in [k, k + kn), for columns of C from `column` on. A few panels
    // are made and used at a time; meanwhile the codes of the next ones are read into the cache, at the end those of
    // row `after`.
    void panel_block(int64_t row, int64_t n, int64_t after, int64_t column, int64_t k, int64_t kn) const {
        CodeSegment segments[kMaxSegments];
        float* scales = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(scratch_.left) + kLeftBytes - kScaleBytes);
        const int64_t num_segments = make_segments(k, kn, scales, segments);
        for (int64_t j = 0; j < n; j += kBlockColumns) {
            const int64_t count = smaller(kBlockColumns, n - j), next = j + kBlockColumns;
            make_panels(row + j, count, k, kn, segments[num_segments - 1].group, scales);
            multiply_panels(count, column + j, next < n ? row + next : after, k, kn, segments, num_segments);
        }
    }

    void make_panels(int64_t row, int64_t n, int64_t k, int64_t kn, int64_t last_group, float* scales) const {
        auto* panels = reinterpret_cast<uint8_t*>(scratch_.panels);
        auto* rows = reinterpret_cast<uint8_t*>(scratch_.left);
        const int64_t first = k / group_, groups = last_group - first + 1, stride = code_row_stride(kn);
        for (int64_t j = 0; j < n; j += kPanelColumns, panels += code_panel_stride(kn)) {
            table_.code_rows(w_, e_, row + j, smaller(kPanelColumns, n - j), k, kn, rows, stride);
            for (int64_t i = 0; i < kn; i += 64) transpose_block(rows + i, stride, panels + i * kPanelColumns);
        }
        for (int64_t j = 0; j < round_up(n, kPanelColumns); ++j) {
            float scale[group_room(kMaxGroups)] = {}, min[group_room(kMaxGroups)] = {};
            if (j < n) table_.code_scales(w_, e_, row + j, first, groups, scale, min);
            for (int64_t g = 0; g < groups; ++g) {
                scales[2 * g * kBlockColumns + j] = scale[g];
                scales[(2 * g + 1) * kBlockColumns + j] = min[g];
            }
        }
    }

    void multiply_panels(int64_t n, int64_t column, int64_t next, int64_t k, int64_t kn, const CodeSegment* segments,
                         int64_t num_segments) const {
        const int panels = static_cast<int>(ceil_div(n, kPanelColumns));
        // the bytes of [k, k + kn) of the next rows, each in a part of the calls
        const int64_t line = 64, lines = ceil_div(w_.row_bytes * kn, round_up(w_.columns, unit_) * line);
        const int64_t calls = ceil_div(m_, MicroDots::kRows);
        for (int64_t i = 0, call = 0; i < m_; i += MicroDots::kRows, ++call) {
            const int m = static_cast<int>(smaller(MicroDots::kRows, m_ - i));
            const int8_t* a[MicroDots::kRows];
            const float* sums[MicroDots::kRows];
            for (int r = 0; r < m; ++r) {
                a[r] = x_.row(index_[i + r]) + k;
                sums[r] = x_.row_sums(index_[i + r]);
            }
            const int64_t at = call * n * lines / calls;
            const uint8_t* ahead =
                w_.row(e_, larger(next, 0) + at / lines) + w_.row_bytes * k / w_.columns + at % lines * line;
            MicroDots::multiply({m, panels, a, sums, reinterpret_cast<const uint8_t*>(scratch_.panels),
                                 code_panel_stride(kn), segments, num_segments, scratch_.c + i * ldc_ + column, ldc_,
                                 ahead, next < 0 ? 0 : line});
        }
    }

    // The runs of steps that the groups of [k, k + kn) are made of, and where their scales are.
    int64_t make_segments(int64_t k, int64_t kn, const float* scales, CodeSegment* segments) const {
        int64_t n = 0;
        bool adds = k > 0;
        for (int64_t at = k, end = k + kn; at < end;) {
            const int64_t group = at / group_, next = (group + 1) * group_;
            const int64_t stop =
                next >= w_.columns ? end : smaller(end, next);  // what is beyond the last column is its
            const bool starts = at % group_ == 0;
            const float* scale = scales + 2 * (group - k / group_) * kBlockColumns;
            const auto run = [&](int64_t first, int64_t count) {
                segments[n++] = {(first - k) / 4,
                                 count / 4,
                                 group,
                                 scale,
                                 starts && table_.code_mins ? scale + kBlockColumns : nullptr,
                                 starts && !table_.code_mins ? table_.zero_code : 0,
                                 false,
                                 adds};
            };
            if (x_.pairs) {
                while (at < stop) {
                    const int64_t unit = at / unit_ * unit_, whole = at == unit ? (stop - at) / unit_ * unit_ : 0;
                    const int64_t to = whole ? at + whole : smaller(stop, unit + unit_), half = (at - unit) / 2;
                    if (whole) {
                        run(at, whole);
                    } else {
                        run(unit + half, (to - at) / 2);
                        run(unit + unit_ / 2 + half, (to - at) / 2);
                    }
                    at = to;
                }
            } else {
                run(at, stop - at);
                at = stop;
            }
            segments[n - 1].ends = true;
            adds = true;
        }
        return n;
    }

    const GemmScratch<T>& scratch_;
    const WeightTensor& w_;
    const FormatTable& table_;
    int64_t e_;
    const CodedRows& x_;
    int64_t group_, unit_, m_, ldc_ = 0;
    int64_t index_[kMaxRows];
};

// C = A . W^T of a block whose rows of A are rows of x, see CodeGemm.
template <class T>
inline void multiply_codes(BlockGemm<T>& block, const GemmScratch<T>& scratch, const Weight<T>& weight, int64_t expert,
                           const CodedRows& x, const int32_t* index, int64_t first, int64_t m, const Columns& columns) {
    if constexpr (std::is_same_v<Acc<T>, float>) {
        CodeGemm<T>(scratch, weight, expert, x, index, first, m).multiply(columns);
        block.holds_product();
    }
}

}  // namespace kt::KT_ISA
