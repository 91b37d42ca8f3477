#pragma once

// C = A . W^T in integers with tiles (isa/micro_dots_amx_int8-inl.h): rows of W are decoded, rows of A are packed into
// panels, and blocks of C are summed transposed. Scales for less than a group of W would require storing the sums of
// every tile, so a row of A has one scale, and two digits in two panels.

#include "gemm/scratch-inl.h"
#include "isa/micro_dots-inl.h"
#include "isa/micro_dots_amx_int8-inl.h"
#include "weights/format_table.h"

namespace kt::KT_ISA {

template <class T>
class CodeTiles {
public:
    CodeTiles(const GemmScratch<T>& scratch, const WeightTensor& w, const FormatTable& table, int64_t expert,
              const CodedRows& x, const int64_t* index, int64_t m)
        : w_(w),
          table_(table),
          e_(expert),
          x_(x),
          index_(index),
          m_(m),
          group_(x.group < w.columns ? x.group : round_up(w.columns, table.code_columns)),
          c_(scratch.c),
          panels_(scratch.code_panels()),
          rows_(scratch.code_rows()) {}

    // Writes rows [0, m) of C: products with the rows of W in `columns`.
    void multiply(const Columns& columns) {
        ldc_ = columns.total();
        const int64_t padded = round_up(w_.columns, table_.code_columns);
        const int64_t most = m_ * kDigits > kMaxRows ? kLeastColumns : kMaxK;  // whose panels fit in scratch
        const int64_t block = group_ <= most ? most / group_ * group_ : most;
        for (int64_t k = 0; k < padded; k += block) {
            const int64_t kn = smaller(block, padded - k);
            make_panels(k, kn);
            multiply_rows(columns.first, columns.count, 0, k, kn);
            if (columns.second >= 0) multiply_rows(columns.second, columns.count, columns.padded(), k, kn);
        }
    }

private:
    static constexpr int64_t kRows = TileDots::kRows, kMaxGroups = kMaxK / 64, kDigits = 2;
    static constexpr int64_t kLeastColumns = kMaxK / kDigits;
    static_assert(kDigits * kMaxRows / kPanelColumns * code_panel_stride(kLeastColumns) <=
                  GemmScratch<T>::kPaddedElements * static_cast<int64_t>(sizeof(Compute<T>)));
    static_assert(kMaxRows / kPanelColumns * code_panel_stride(kMaxK) <=
                  GemmScratch<T>::kPaddedElements * static_cast<int64_t>(sizeof(Compute<T>)));

    // Packs a panel of high digits and one of low digits for every 16 rows.
    void make_panels(int64_t k, int64_t kn) const {
        uint8_t* panel = panels_;
        for (int64_t i = 0; i < m_; i += kPanelColumns) {
            for (int64_t d = 0; d < kDigits; ++d, panel += code_panel_stride(kn)) {
                pack_columns(smaller(kPanelColumns, m_ - i), kn, panel,
                             [&](int64_t j, int64_t at, int64_t count, uint8_t* to) {
                                 const int8_t* from = x_.row(index_[(i + j) * kDigits + d]);
                                 std::memcpy(to, from + k + at, static_cast<size_t>(count));
                             });
            }
        }
    }

    // Products with rows [row, row + n) of W, over [k, k + kn), for columns of C from `column` on.
    void multiply_rows(int64_t row, int64_t n, int64_t column, int64_t k, int64_t kn) const {
        const int64_t first = k / group_, groups = (smaller(k + kn, w_.columns) - 1) / group_ - first + 1;
        for (int64_t j = 0; j < n; j += kRows) {
            const int64_t count = smaller(kRows, n - j);
            table_.code_rows(w_, e_, row + j, count, k, kn, rows_, code_row_stride(kn));
            alignas(64) float scale[kMaxGroups][kRows] = {}, min[kMaxGroups][kRows] = {};
            for (int64_t r = 0; r < count; r += kPanelColumns) {
                table_.code_scales(w_, e_, row + j + r, smaller(kPanelColumns, count - r), first, groups, scale[0] + r,
                                   min[0] + r, kRows);
            }
            if (k % group_) std::memset(min, 0, sizeof(min));  // subtracted by the block before
            for (int64_t i = 0; i < m_; i += kPanelColumns) {
                // prefetch the rows after these, a share in each pass
                const int64_t part = kRows * i / m_, end = kRows * smaller(m_, i + kPanelColumns) / m_;
                TileDots::ReadAhead ahead{w_.row(e_, row + j + kRows + part) + w_.row_bytes * k / w_.columns,
                                          w_.row_bytes, end - part, w_.row_bytes * TileDots::kColumns / w_.columns};
                const uint8_t* panels = panels_ + i / kPanelColumns * kDigits * code_panel_stride(kn);
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t from = g * group_, steps = (smaller(group_, kn - from)) / TileDots::kColumns;
                    alignas(64) int32_t sums[32 * 32];
                    TileDots::multiply(rows_ + from, code_row_stride(kn), count, panels + from * kPanelColumns,
                                       code_panel_stride(kn), kDigits * kPanelColumns, steps, sums, ahead);
                    ahead.from += steps * ahead.bytes;
                    add(sums, i, column + j, count, scale[g], min[g], first + g, k > 0 || g > 0);
                }
            }
        }
    }

    // Rows [i, i + 16) of C (+)= scale * the rows' scales * sums - min * the rows' sums of a group
    void add(const int32_t* sums, int64_t i, int64_t column, int64_t n, const float* scale, const float* min,
             int64_t group, bool adds) const {
        for (int64_t q = 0; q < n; q += kPanelColumns) {
            alignas(64) uint32_t high[16 * 16], low[16 * 16];
            transpose_16x16(reinterpret_cast<const char*>(sums + q * 32), 128, high);
            transpose_16x16(reinterpret_cast<const char*>(sums + q * 32 + kPanelColumns), 128, low);
            const VecF factor = load(scale + q), offset = load(min + q);
            for (int64_t r = 0; r < smaller(m_ - i, kPanelColumns); ++r) {
                const int64_t digits[] = {index_[(i + r) * kDigits], index_[(i + r) * kDigits + 1]};
                const VecF sum = to_floats(load_bits<VecI32>(high + 16 * r)) * static_cast<float>(CodedRows::kDigit) +
                                 to_floats(load_bits<VecI32>(low + 16 * r));
                const float of_group = x_.row_sums(digits[0])[group] + x_.row_sums(digits[1])[group];
                const VecF product = sum * (factor * x_.row_scales(digits[1])[0]) - offset * of_group;
                float* c = c_ + (i + r) * ldc_ + column + q;
                store(c, adds ? load(c) + product : product);
            }
        }
    }

    const WeightTensor& w_;
    const FormatTable& table_;
    int64_t e_;
    const CodedRows& x_;
    const int64_t* index_;
    int64_t m_, group_, ldc_ = 0;
    float* c_;
    uint8_t *panels_, *rows_;
};

}  // namespace kt::KT_ISA
