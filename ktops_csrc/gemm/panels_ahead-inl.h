#pragma once

// kPanelsAhead: products down the rows of W, whose next block is packed while one is multiplied.
//
// Blocks of W have kBlockK rows and the columns of a slab. Two of them and the rows of A stay in L2.

#include "gemm/block_gemm-inl.h"
#include "isa/pack_ahead-inl.h"

namespace kt::KT_ISA {

template <class T>
class PanelsAhead {
    using Gemm = typename MicroGemm<T>::Ahead;

public:
    // w: an expert's rows of W; its columns [first, first + n) are multiplied. after: rows that the thread probably
    // needs next, or null.
    PanelsAhead(const GemmScratch<T>& scratch, const T* w, int64_t row_stride, int64_t k, int64_t first, int64_t n,
                const T* after)
        : scratch_(scratch), w_(w + first), row_stride_(row_stride), k_(k), first_(first), n_(n), after_(after) {}

    // C = A . W for `rows` rows of A. Calls put(block, i, m, columns) with rows [i, i + m) of C, kAheadStep columns at
    // a time.
    template <class Put>
    void multiply(const Rows<T>& a, int64_t rows, Put put) {
        const int64_t passes = ceil_div(rows, kMostRows), size = ceil_div(rows, passes);
        const auto bytes = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); };
        const AheadSlabs slabs{reinterpret_cast<const char*>(w_), bytes(kAheadStep), ceil_div(n_, kAheadStep), passes,
                               reinterpret_cast<const char*>(after_)};
        PackAhead packing(slabs, bytes(row_stride_), k_);
        start(packing, 0, 0, 1);
        Gemm::finish(packing);
        for (int64_t i = 0, slab = 0; i < rows; i += size) {
            const int64_t m = smaller(size, rows - i);
            for (int64_t j = 0; j < n_; j += kAheadStep, ++slab) {
                const Columns columns{first_ + j, smaller(kAheadStep, n_ - j)};
                BlockGemm<T> block(scratch_, m, columns.count);
                multiply_slab(packing, a.from(i), m, columns.count, slab);
                block.holds_product();
                put(block, i, m, columns);
            }
        }
    }

private:
    static constexpr int64_t kMostRows = 192, kBlockK = 512;
    // Elements between the groups of a block: not a power of two, or their lines would share a few sets of the cache.
    static constexpr int64_t kGroup = kAheadColumns * kBlockK + 32, kBlock = kAheadGroups * kGroup;
    static_assert(2 * kBlock <= GemmScratch<T>::kAheadElements);

    T* panels() const { return scratch_.ahead_panels() + turn_ * kBlock; }

    // Starts to pack the block of rows from k0 on of a slab.
    void start(PackAhead& packing, int64_t slab, int64_t k0, int64_t steps) {
        turn_ ^= 1;
        if (slab == packing.slabs.count * packing.slabs.passes) return;
        const int64_t j = slab % packing.slabs.count * kAheadStep;
        packing.start(packing.slabs.slab(slab) + k0 * packing.stride, smaller(kBlockK, k_ - k0),
                      smaller(kAheadStep, n_ - j), reinterpret_cast<char*>(panels()),
                      kGroup * static_cast<int64_t>(sizeof(T)), steps);
    }

    void multiply_slab(PackAhead& packing, const Rows<T>& a, int64_t m, int64_t columns, int64_t slab) {
        const int64_t parts = ceil_div(m, Gemm::kRows), groups = columns / kAheadColumns;
        for (int64_t k0 = 0; k0 < k_; k0 += kBlockK) {
            const int64_t kn = smaller(kBlockK, k_ - k0),
                          steps = ceil_div(groups, Gemm::kGroups) * parts * (kn / kAheadK);
            const T* b = panels();
            const bool last = k0 + kBlockK >= k_;
            start(packing, slab + last, last ? 0 : k0 + kBlockK, steps);
            for (int64_t g = 0; g < groups; g += Gemm::kGroups, b += Gemm::kGroups * kGroup) {
                const int some = static_cast<int>(smaller(Gemm::kGroups, groups - g));
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t i = m * part / parts, count = m * (part + 1) / parts - i;
                    const T* rows[Gemm::kRows];
                    for (int64_t r = 0; r < count; ++r) rows[r] = a.row(i + r) + k0;
                    Gemm::multiply(static_cast<int>(count), some, rows, b, kGroup, kn,
                                   scratch_.c + i * columns + g * kAheadColumns, columns, k0 > 0, packing);
                }
            }
            Gemm::finish(packing);
        }
    }

    const GemmScratch<T>& scratch_;
    const T* w_;
    int64_t row_stride_, k_, first_, n_;
    const T* after_;
    int turn_ = 0;  // of the two blocks: the one that is packed
};

}  // namespace kt::KT_ISA
