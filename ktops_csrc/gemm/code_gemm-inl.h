#pragma once

// C = A . W^T in integers: A as CodedRows, W in an integer format. What BlockGemm::multiply_nt is to floats.

#include "gemm/block_gemm-inl.h"
#include "isa/micro_dots-inl.h"

namespace kt::KT_ISA {

// Up to this many rows, codes are multiplied where they lie; a panel would not be used often enough.
constexpr int64_t kCodeDotRows = 8;

template <class T>
class CodeGemm {
public:
    // Row i of A, i < m <= kMaxRows, is row index[i] of x, or first + i without an index.
    CodeGemm(const GemmScratch<T>& scratch, const Weight<T>& weight, int64_t expert, const CodedRows& x,
             const int32_t* index, int64_t first, int64_t m)
        : scratch_(scratch), w_(weight.tensor()), table_(weight.table()), e_(expert), x_(x), m_(m) {
        for (int64_t i = 0; i < m; ++i) index_[i] = index ? index[i] : first + i;
    }

    // Writes rows [0, m) of scratch.c: products with the rows of W that `columns` names.

    void multiply(const Columns& columns) {
        const int64_t ldc = columns.total();
        float* c = scratch_.c;
        if (m_ <= kCodeDotRows) {
            dots(columns.first, columns.count, c, ldc);
            if (columns.second >= 0) dots(columns.second, columns.count, c + columns.padded(), ldc);
            return;
        }
        panels(columns);
        for (int64_t i = 0; i < m_; ++i) {
            float* row = c + i * ldc;
            for_each_vector<float>(
                ldc, [&](int64_t j, int64_t n) { store_n(row + j, load_n(row + j, n) * x_.scale[index_[i]], n); });
        }
    }

private:
    static constexpr int64_t kLeftBytes = GemmScratch<T>::kLeftElements * static_cast<int64_t>(sizeof(Compute<T>));

    void dots(int64_t row, int64_t n, float* c, int64_t ldc) const {
        const int64_t few = table_.few_rows;
        constexpr int64_t kStrip = 64;  // rows of W that stay in cache for all rows of A
        for (int64_t j = 0; j < n; j += kStrip) {
            for (int64_t i = 0; i < m_; i += few) {
                table_.code_dots(w_, e_, row + j, smaller(kStrip, n - j), x_, index_ + i, smaller(few, m_ - i),
                                 c + i * ldc + j, ldc);
            }
        }
    }

    // k is walked in blocks of whole groups, or of parts of one group, whose panels and scales fit in scratch.
    void panels(const Columns& columns) const {
        const int64_t ldc = columns.total(), K = w_.columns, padded = round_up(K, CodedRows::kMultiple);
        const int64_t group = smaller(w_.group, padded);
        const int64_t fits = smaller(kPanelBytes / ldc - 64, kLeftBytes / 2 / (8 * ldc) * smaller(group, kMaxK));
        int64_t block = smaller(smaller(fits, kMaxK), (kLeftBytes / 2 / kPanelColumns) - 64);
        const int64_t step = group % CodedRows::kMultiple ? 2 * group : group;
        block = step <= block ? block / step * step : block / CodedRows::kMultiple * CodedRows::kMultiple;
        for (int64_t k = 0; k < padded; k += block) panel_block(columns, k, smaller(block, padded - k), k > 0);
    }

    void panel_block(const Columns& columns, int64_t k, int64_t kn, bool accumulate) const {
        const int64_t ldc = columns.total(), stride = kn * kPanelColumns + 64;
        auto* panels = reinterpret_cast<uint8_t*>(scratch_.panels);
        auto* rows = reinterpret_cast<uint8_t*>(scratch_.left);
        float* scales = reinterpret_cast<float*>(rows + kLeftBytes / 2);
        CodeSegment segments[kMaxK / kChunk];
        const int64_t num_segments = make_segments(k, kn, scales, ldc, segments);
        float* mins = scales + num_segments * ldc;
        const auto prepare = [&](int64_t first, int64_t count, int64_t at) {
            for (int64_t j = 0; j < count; j += kPanelColumns) {
                const int64_t n = smaller(kPanelColumns, count - j);
                table_.code_panel(w_, e_, first + j, n, k, kn, rows, panels + (at + j) / kPanelColumns * stride);
            }
            for (int64_t j = 0; j < round_up(count, kPanelColumns); ++j) {
                float scale[kMaxK / kChunk] = {}, min[kMaxK / kChunk] = {};
                if (j < count) table_.code_scales(w_, e_, first + j, segments[0].group, num_segments, scale, min);
                for (int64_t s = 0; s < num_segments; ++s) {
                    scales[s * ldc + at + j] = scale[s];
                    mins[s * ldc + at + j] = min[s];
                }
            }
        };
        prepare(columns.first, columns.count, 0);
        if (columns.second >= 0) prepare(columns.second, columns.count, columns.padded());
        for (int64_t p = 0; p < ldc / kPanelColumns; p += MicroDots::kPanels) {
            const int count = static_cast<int>(smaller(MicroDots::kPanels, ldc / kPanelColumns - p));
            for (int64_t i = 0; i < m_; i += MicroDots::kRows) {
                const int m = static_cast<int>(smaller(MicroDots::kRows, m_ - i));
                const int8_t* a[MicroDots::kRows];
                const float* sums[MicroDots::kRows];
                for (int r = 0; r < m; ++r) {
                    a[r] = x_.row(index_[i + r]) + k;
                    sums[r] = x_.row_sums(index_[i + r]);
                }
                MicroDots::multiply({m, count, a, sums, panels + p * stride, stride, segments, num_segments,
                                     scratch_.c + i * ldc + p * kPanelColumns, ldc, accumulate});
            }
            for (int64_t s = 0; s < num_segments; ++s) {
                segments[s].scale += MicroDots::kPanels * kPanelColumns;
                if (segments[s].min) segments[s].min += MicroDots::kPanels * kPanelColumns;
            }
        }
    }

    // The groups that [k, k + kn) is made of.
    int64_t make_segments(int64_t k, int64_t kn, const float* scales, int64_t ldc, CodeSegment* segments) const {
        const int64_t last = round_up(w_.columns, CodedRows::kMultiple);
        int64_t n = 0;
        for (int64_t at = k; at < k + kn; ++n) {
            const int64_t group = at / w_.group, end = smaller(k + kn, (group + 1) * w_.group);
            // what is beyond the last column belongs to the last group
            const bool is_last = (group + 1) * w_.group >= w_.columns;
            const int64_t stop = is_last ? smaller(k + kn, last) : end;
            const bool starts = at % w_.group == 0, zeros = w_.zero.data != nullptr;
            segments[n] = {(stop - at) / 4, group, scales + n * ldc, starts && zeros ? scales : nullptr,
                           starts && !zeros ? table_.zero_code : 0};
            at = stop;
        }
        for (int64_t s = 0; s < n; ++s) {
            if (segments[s].min) segments[s].min = scales + (n + s) * ldc;
        }
        return n;
    }

    const GemmScratch<T>& scratch_;
    const WeightTensor& w_;
    const FormatTable& table_;
    int64_t e_;
    const CodedRows& x_;
    int64_t m_;
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
