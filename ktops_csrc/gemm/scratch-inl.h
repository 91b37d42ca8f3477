#pragma once

// A thread's scratch memory for products, and the block of C in it.

#include "core/workspace.h"
#include "gemm/path.h"
#include "isa/bands-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/pack_ahead-inl.h"

namespace kt::KT_ISA {

// Up to two ranges of columns of B, consecutive in C: the gate and the up half of gate_up_proj.
struct Columns {
    int64_t first, count;
    int64_t second = -1;

    int64_t padded() const { return round_up(count, kPanelColumns); }
    int64_t total() const { return (second < 0 ? 1 : 2) * padded(); }
    // The column of C for one of B. The second range is behind the first.
    int64_t at(int64_t column) const {
        return second >= 0 && column >= second ? padded() + column - second : column - first;
    }
};

// Calls f(first column of B, its column of C) for each range, where c is the first column of C.
template <class Column, class F>
inline void for_each_range(const Columns& columns, Column c, F f) {
    f(columns.first, c);
    if (columns.second >= 0) f(columns.second, c + columns.padded());
}

// The first of the rows of W that a thread will probably need after a product. The product prefetches them.
struct NextRows {
    int64_t expert = -1, row = 0;  // -1: none
};

// kPanelsAhead: elements of a block of W in panels, and of sums that are not in rows of C. Neither groups nor blocks
// start a power of two apart, or their lines would share a few sets of the cache.
constexpr int64_t kAheadGap = 32;
template <class C>
constexpr int64_t ahead_block_elements() {
    if constexpr (MicroGemm<C>::kPacksAhead) {
        return MicroGemm<C>::Ahead::kBlockElements +
               (MicroGemm<C>::Ahead::kMostColumns / kAheadColumns + 1) * kAheadGap;
    }
    return 0;
}
template <class C>
constexpr int64_t ahead_sums() {
    if constexpr (MicroGemm<C>::kPacksAhead) return MicroGemm<C>::Ahead::kSums;
    return 0;
}

// Each path uses `panels` and `left` in its own way; the member functions name these uses.
template <class T>
struct GemmScratch {
    using C = Compute<T>;
    static constexpr auto kElementBytes = static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kPanelElements = kPanelBytes / kElementBytes;
    // Between panels: if they started a power of two apart, their lines would share a few sets of the cache.
    static constexpr int64_t kPadding = 64 / kElementBytes;
    static constexpr int64_t kPaddedElements = kPanelElements + kWideColumns / kPanelColumns * kPadding;
    static constexpr int64_t kLeftElements = kRowBytes / kElementBytes;
    // Rows of A that are staged; or the tiles of a band, twice, and the factor of a product added to it, three times.
    static constexpr int64_t kStagedElements = MicroGemm<C>::kRows * staged_row_stride<C>(kMaxK);
    static constexpr int64_t kBandElements =
        4 * kBandPanels * kTileSums * (4 / kElementBytes) + 3 * kBandRank * kPanelColumns;
    static constexpr bool kHasBands = MicroGemm<C>::kReadsRows, kPacksAhead = MicroGemm<C>::kPacksAhead;
    static constexpr int64_t kStageElements = kHasBands ? larger(kStagedElements, kBandElements) : kStagedElements;

    C* panels;
    C* left;   // kRowBytes
    C* stage;  // rows of A that the micro-kernel can't read in place; tiles of a band
    Acc<T>* c;
    Acc<T>* sums;                // in tiles: of blocks that are packed ahead, or of a band in blocks of k
    std::optional<Path> forced;  // for tests, see choose_path

    // In `panels`: copied rows of a weight; panels of codes.
    T* copied_rows() const { return reinterpret_cast<T*>(panels); }
    C* ahead_panels(int block) const {  // beside those of products that are added
        return panels + kPaddedElements + block * ahead_block_elements<C>();
    }
    uint8_t* code_panels() const { return reinterpret_cast<uint8_t*>(panels); }

    // In `left`: panels of the left operand; decoded rows of a weight; rows of A in float32, in the order of a format's
    // chunks; rows of codes; scales of codes.
    C* left_panels() const { return left; }
    T* decoded_rows() const { return reinterpret_cast<T*>(left); }
    float* ordered_rows() const { return reinterpret_cast<float*>(left); }
    uint8_t* code_rows() const { return reinterpret_cast<uint8_t*>(left); }
    float* code_scales() const { return reinterpret_cast<float*>(left); }

    GemmScratch(Workspace& workspace, std::optional<Path> forced)
        : panels(workspace.take<C>(
              larger(kPaddedElements + 2 * ahead_block_elements<C>(), kHasBands ? kBandBytes / kElementBytes : 0))),
          left(workspace.take<C>(kLeftElements)),
          stage(workspace.take<C>(kStageElements)),
          c(workspace.take<Acc<T>>(kMaxRows * kMaxColumns)),
          sums(workspace.take<Acc<T>>(ahead_sums<C>())),
          forced(forced) {}
};

// The block of C that a product writes or, if `adds`, adds to: `columns` accumulators a row, in scratch.c.
template <class T>
struct Block {
    const GemmScratch<T>& scratch;
    int64_t rows, columns;
    bool adds = false;

    Acc<T>* row(int64_t i) const { return scratch.c + i * columns; }
};

}  // namespace kt::KT_ISA
