#pragma once

// Bands: 32 rows of a weight W where they lie, in two halves of 16, times panels of A. The transpose of C is summed, in
// tiles of 16 rows of W by the 16 columns of a panel.
//
//   tile (h, p)[i][j] (+)= sum over k of row i of half h . column j of panel p     h < halves, p < panels
//
// MicroGemm<T>::band computes them on ISAs where MicroGemm<T>::kReadsRows.

#include <cstdint>

#include "core/views.h"
#include "isa/pace-inl.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kHalfRows = 16, kBandRows = 2 * kHalfRows;
constexpr int kBandPanels = 3;  // the most panels at once
constexpr int64_t kTileSums = kHalfRows * kPanelColumns;

// k advances by this many elements between two steps of ReadAhead; k is a multiple of it.
constexpr int64_t kBandK = 32;

template <class C>
struct BandArguments {
    int halves, panels;
    const C* rows[2];  // of each half, row_stride apart
    int64_t row_stride;
    const C* b;
    int64_t b_stride, k;
    Acc<C>* tiles;  // [2][kBandPanels][16][16]
    bool accumulate;

    Acc<C>* tile(int half, int panel) const { return tiles + (half * kBandPanels + panel) * kTileSums; }
};

// Prefetches the next rows of a weight into L2 while others are multiplied, spread evenly over the steps of their
// products. Memory is fastest with eight streams; more lines at once would keep the products waiting.
class ReadAhead {
public:
    // Rows of up to two halves; first[1] may be null.
    void start(const char* const (&first)[2], int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t steps) {
        const int64_t per_half = first[1] ? kStreams / 2 : kStreams, each = ceil_div(rows, per_half);
        for (int64_t i = 0; i < kStreams; ++i) {
            from_[i] = first[i / per_half] + smaller(i % per_half * each, rows - 1) * stride_bytes;
        }
        row_lines_ = ceil_div(row_bytes, kLine);
        skip_ = stride_bytes - row_lines_ * kLine;
        line_ = offset_ = 0;
        pace_.start(each * row_lines_, steps);
    }

    __attribute__((always_inline)) void step() {
        pace_.step([&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < kStreams; ++i) __builtin_prefetch(from_[i] + offset_, 0, 2);
            offset_ += kLine;
            if (++line_ < row_lines_) return;
            line_ = 0;
            offset_ += skip_;
        });
    }

private:
    static constexpr int64_t kStreams = 8, kLine = 64;

    const char* from_[kStreams] = {};
    int64_t row_lines_ = 0, skip_ = 0, line_ = 0, offset_ = 0;
    Pace pace_;  // of a line of each stream
};

}  // namespace kt::KT_ISA
