#pragma once

// Packing the next block of a weight while another is multiplied, for products down its rows (x W).
//
//   panels    [columns / 32][k / 2][2][16][2]    32 columns of two rows are two registers, interleaved in the order
//                                                of ColumnStep, which sums keep until they are stored
//
// Whole pieces of two rows are packed in order, block after block, slab after slab: memory is read in few streams and
// evenly over the products. MicroGemm<T>::Ahead does it on ISAs where MicroGemm<T>::kPacksAhead.

#include <cstdint>

#include "core/views.h"
#include "isa/pace-inl.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kAheadColumns = 32;  // of a group
constexpr int64_t kAheadGroups = 4;    // the most groups of a slab
constexpr int64_t kAheadStep = kAheadGroups * kAheadColumns;

// k advances by this many elements between two steps of PackAhead; k is a multiple of it.
constexpr int64_t kAheadK = 16;

// The slabs of W that are multiplied one after the other, `passes` times: first + i * bytes for i < count, then
// `after`, which is only prefetched; null for none.
struct AheadSlabs {
    const char* first;
    int64_t bytes, count, passes;
    const char* after;

    const char* slab(int64_t i) const {
        if (i < count * passes) return first + i % count * bytes;
        return i == count * passes ? after : nullptr;
    }
};

// Where packing is. `ahead` is the row that is prefetched, kAheadRows further on.
struct alignas(64) PackAhead {
    static constexpr int64_t kAheadRows = 32;

    AheadSlabs slabs;
    int64_t stride, k;  // of W, in bytes; its rows
    const char* from = nullptr;
    char* to = nullptr;
    int64_t groups = 0, group_bytes = 0;
    Pace pace;  // of pairs of rows
    const char* ahead;
    int64_t ahead_slab = 0, ahead_left;  // rows left in its slab

    PackAhead(const AheadSlabs& s, int64_t stride_bytes, int64_t rows)
        : slabs(s),
          stride(stride_bytes),
          k(rows),
          ahead(s.first + smaller(kAheadRows, rows) * stride_bytes),
          ahead_left(rows - smaller(kAheadRows, rows)) {
        if (!ahead_left) next_slab();
    }

    // Packs `rows` rows of `columns` columns over the next `steps` steps.
    void start(const char* w, int64_t rows, int64_t columns, char* panels, int64_t bytes, int64_t steps) {
        from = w;
        to = panels;
        groups = columns / kAheadColumns;
        group_bytes = bytes;
        pace.start(rows / 2, steps);
    }

    void next_slab() {
        ahead = slabs.slab(++ahead_slab);
        ahead_left = k;
    }
};

}  // namespace kt::KT_ISA
