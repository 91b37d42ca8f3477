#pragma once

// Packing the next block of a weight while another is multiplied, for products down its rows (x W).
//
//   panels    [columns / 32][k / 2][2][16][2]    32 columns of two rows are two registers, interleaved within 128-bit
//                                                lanes, so sums have an order of their own until they are stored
//
// Pieces of two rows are packed in order, block after block, slab after slab: memory is read in few streams and evenly
// over the products. MicroGemm<T>::Ahead does it on ISAs where MicroGemm<T>::kPacksAhead.

#include <cstdint>

#include "core/views.h"
#include "isa/pace-inl.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kAheadColumns = 32;  // of a group
constexpr int64_t kPackedGroups = 4;   // the most groups of a piece
constexpr int64_t kPackedColumns = kPackedGroups * kAheadColumns;
constexpr int64_t kMostAheadColumns = 2048, kMostAheadRows = 512;  // of a block

// The columns of a slab, and the rows of a block of it.
struct AheadShape {
    int64_t columns, k;
};

// Returns slabs of about equal width for so many columns, each at most `most` and a multiple of kPackedColumns, and
// blocks of at most `elements` with a multiple of `step` rows.
constexpr AheadShape ahead_shape(int64_t columns, int64_t most, int64_t elements, int64_t step) {
    most = smaller(kMostAheadColumns, larger(kPackedColumns, most / kPackedColumns * kPackedColumns));
    const int64_t slab = round_up(ceil_div(columns, ceil_div(columns, most)), kPackedColumns);
    return {slab, smaller(kMostAheadRows, elements / slab) / step * step};
}

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

// What is prefetched: rows of W, of which a piece has so many bytes.
struct AheadRows {
    AheadSlabs slabs;
    int64_t stride, k;  // in bytes; the number of rows
    int64_t piece_bytes;
    int64_t distance;  // rows from those packed to those prefetched
};

// Where packing is: what a kernel keeps in registers, as far as it can, and stores as a whole line.
struct alignas(64) PackState {
    const char* from = nullptr;
    char* to = nullptr;
    int64_t group = 0;            // the first of the next piece
    Pace pace;                    // of pieces
    const char* ahead = nullptr;  // the row that is prefetched
    int64_t ahead_left = 0;       // rows left in its slab
};

struct PackAhead {
    PackState at;
    AheadRows rows;
    int64_t stride;  // of the rows that are packed, in bytes
    int64_t groups = 0, group_bytes = 0;
    const char *begin = nullptr, *end = nullptr;  // of a ring of rows, if they are in one
    int64_t ahead_slab = 0;

    explicit PackAhead(const AheadRows& r) : rows(r), stride(r.stride) {
        at.ahead = r.slabs.first + smaller(r.distance, r.k) * r.stride;
        at.ahead_left = r.k - smaller(r.distance, r.k);
        if (!at.ahead_left) next_slab(at);
    }

    // Packs `count` rows of `columns` columns over the next `steps` steps.
    void start(const char* w, int64_t count, int64_t columns, char* panels, int64_t bytes, int64_t steps) {
        at.from = w;
        at.to = panels;
        groups = columns / kAheadColumns;
        group_bytes = bytes;
        at.pace.start(count / 2 * pieces(), steps);
    }

    // Of two rows.
    int64_t pieces() const { return ceil_div(groups, kPackedGroups); }

    void next_slab(PackState& state) {
        state.ahead = rows.slabs.slab(++ahead_slab);
        state.ahead_left = rows.k;
    }
};

}  // namespace kt::KT_ISA
