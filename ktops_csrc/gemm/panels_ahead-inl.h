#pragma once

// kPanelsAhead: products down the rows of W, whose next block is packed while one is multiplied.
//
// A block of W is some rows of the columns of a slab. Two of them, the rows of A and the sums stay in L2. Rows of a
// weight in a format are decoded between products.

#include "gemm/block_gemm-inl.h"
#include "isa/pack_ahead-inl.h"

namespace kt::KT_ISA {

template <class T, class Weight>
class PanelsAhead {
    using Gemm = typename MicroGemm<T>::Ahead;

public:
    // Multiplies columns [first, first + n) of an expert's W, of k rows. after: the expert and the first column that
    // the thread probably needs next.
    PanelsAhead(const GemmScratch<T>& scratch, const Weight& weight, int64_t expert, int64_t k, int64_t first,
                int64_t n, const NextRows& after)
        : scratch_(scratch),
          weight_(weight),
          decodes_(weight.has_format()),
          expert_(expert),
          k_(k),
          first_(first),
          n_(n),
          after_(after) {}

    // C = A . W for `rows` rows of A. Calls put(block, i, m, columns) with rows [i, i + m) of some columns of C.
    template <class Put>
    void multiply(const Rows<T>& a, int64_t rows, Put put) {
        const int64_t passes = ceil_div(rows, Gemm::kMostRows), size = ceil_div(rows, passes);
        shape_ = Gemm::shape(size, n_, decodes_);
        PackAhead packing(rows_ahead(passes));
        start(packing, 0, 0, 1);
        finish(packing);
        for (int64_t i = 0, slab = 0; i < rows; i += size) {
            const int64_t m = smaller(size, rows - i);
            for (int64_t j = 0; j < n_; j += shape_.columns, ++slab) {
                const int64_t n = smaller(shape_.columns, n_ - j);
                multiply_slab(packing, a.from(i), m, n, slab);
                put_slab(i, m, {first_ + j, n}, put);
            }
        }
    }

private:
    static constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    static constexpr int64_t kDecodedRows = 8;

    // Rows of W, or of its codes.
    AheadRows rows_ahead(int64_t passes) const {
        const auto bytes = [&](int64_t columns) { return decodes_ ? weight_.code_bytes(columns) : columns * kBytes; };
        const auto row = [&](int64_t expert, int64_t column) {
            const auto* first = reinterpret_cast<const char*>(weight_.direct(expert));
            if (decodes_) first = reinterpret_cast<const char*>(weight_.tensor().row(expert, 0));
            return first + bytes(column);
        };
        const AheadSlabs slabs{row(expert_, first_), bytes(shape_.columns), ceil_div(n_, shape_.columns), passes,
                               after_.expert < 0 ? nullptr : row(after_.expert, after_.row)};
        return {slabs, decodes_ ? weight_.tensor().row_bytes : weight_.row_stride * kBytes, k_, bytes(kPackedColumns),
                Gemm::kRowsAhead};
    }

    Acc<T>* sums() const { return Gemm::kSums > 0 ? scratch_.sums : scratch_.c; }
    int64_t group_elements() const { return kAheadColumns * shape_.k + kAheadGap; }

    // Starts to pack the block of rows from k0 on of a slab, over so many steps.
    void start(PackAhead& packing, int64_t slab, int64_t k0, int64_t steps) {
        turn_ ^= 1;
        if (slab == packing.rows.slabs.count * packing.rows.slabs.passes) return;
        const int64_t j = slab % packing.rows.slabs.count * shape_.columns;
        const int64_t rows = smaller(shape_.k, k_ - k0), columns = smaller(shape_.columns, n_ - j);
        const char* from = decodes_ ? ring() : packing.rows.slabs.slab(slab) + k0 * packing.rows.stride;
        packing.start(from, rows, columns, reinterpret_cast<char*>(scratch_.ahead_panels(turn_)),
                      group_elements() * kBytes, steps);
        if (decodes_) start_decoding(packing, k0, {first_ + j, columns});
    }

    // Rows are decoded to a ring, some at a time, not much earlier than they are packed: they stay in L1.
    char* ring() const { return reinterpret_cast<char*>(scratch_.decoded_rows()); }

    void start_decoding(PackAhead& packing, int64_t k0, const Columns& columns) {
        packing.stride = columns.count * kBytes + 64;
        const int64_t pieces = packing.pieces() * kDecodedRows / 2, bytes = kDecodedRows * packing.stride;
        const int64_t most = packing.at.pace.due(Gemm::steps(Gemm::kRows, shape_.k)) / pieces + 2;
        const int64_t parts = smaller(most, kRowBytes / bytes);
        packing.begin = ring();
        packing.end = ring() + parts * bytes;
        decoding_ = {k0, k0 + packing.at.pace.hold() / packing.pieces() * 2, (parts - 1) * pieces + 1, columns, ring()};
    }

    // Decodes until so many pieces can be packed.
    void decode(PackAhead& packing, int64_t pieces) {
        while (decoding_.row < decoding_.end && packing.at.pace.left() < smaller(pieces, decoding_.room)) {
            const Columns& columns = decoding_.columns;
            const int64_t ahead = decoding_.row + Gemm::kRowsAhead;
            const int64_t n = smaller(kDecodedRows, k_ - ahead);
            weight_.prefetch_scales(expert_, ahead, n, columns.first, columns.count);
            const int64_t rows = smaller(kDecodedRows, decoding_.end - decoding_.row);
            weight_.decode_rows(expert_, decoding_.row, rows, columns.first, columns.count,
                                reinterpret_cast<T*>(decoding_.to), packing.stride / kBytes);
            decoding_.row += rows;
            decoding_.to += kDecodedRows * packing.stride;
            if (decoding_.to == packing.end) decoding_.to = ring();
            packing.at.pace.allow(packing.pieces() * rows / 2);
        }
    }

    void finish(PackAhead& packing) {
        if (decodes_) {
            for (; decoding_.row < decoding_.end; Gemm::finish(packing)) decode(packing, packing.pieces());
        }
        Gemm::finish(packing);
    }

    void multiply_slab(PackAhead& packing, const Rows<T>& a, int64_t m, int64_t columns, int64_t slab) {
        const int64_t groups = columns / kAheadColumns;
        for (int64_t k0 = 0; k0 < k_; k0 += shape_.k) {
            const int64_t kn = smaller(shape_.k, k_ - k0);
            const T* b = scratch_.ahead_panels(turn_);
            const bool last = k0 + kn == k_;
            int64_t steps = 0;
            Gemm::for_each_part(m, [&](int64_t, int64_t count) { steps += Gemm::steps(count, kn); });
            start(packing, slab + last, last ? 0 : k0 + kn, ceil_div(groups, Gemm::kGroups) * steps);
            if constexpr (Gemm::kStaged) stage(a, m, k0, kn);
            for (int64_t g = 0; g < groups; g += Gemm::kGroups, b += Gemm::kGroups * group_elements()) {
                const int some = static_cast<int>(smaller(Gemm::kGroups, groups - g));
                Gemm::for_each_part(m, [&](int64_t i, int64_t count) {
                    if (decodes_) decode(packing, packing.at.pace.due(Gemm::steps(count, kn)));
                    const T* rows[Gemm::kRows];
                    if constexpr (Gemm::kStaged) {
                        rows[0] = scratch_.stage + i * kn;
                    } else {
                        for (int64_t r = 0; r < count; ++r) rows[r] = a.row(i + r) + k0;
                    }
                    Gemm::multiply(static_cast<int>(count), some, rows, b, group_elements(), kn,
                                   sums() + Gemm::sums_at(i, g, m, columns), columns, k0 > 0, packing);
                });
            }
            finish(packing);
        }
    }

    // Copies columns [k0, k0 + kn) of A to tiles.
    void stage(const Rows<T>& a, int64_t m, int64_t k0, int64_t kn) const {
        static_assert(Gemm::kStagedElements <= GemmScratch<T>::kStageElements);
        const T* rows[Gemm::kMostRows];
        for (int64_t i = 0; i < m; ++i) rows[i] = a.row(i) + k0;
        Gemm::stage(rows, m, kn, scratch_.stage);
    }

    // Sums in tiles are copied to rows of C some columns at a time.
    template <class Put>
    void put_slab(int64_t i, int64_t m, const Columns& slab, Put put) const {
        const int64_t step = Gemm::kSums > 0 ? kPackedColumns : slab.count;
        for (int64_t j = 0; j < slab.count; j += step) {
            const Columns columns{slab.first + j, smaller(step, slab.count - j)};
            if constexpr (Gemm::kSums > 0) {
                const Acc<T>* from = sums() + Gemm::sums_at(0, j / kAheadColumns, m, slab.count);
                Gemm::put_sums(from, m, columns.count, scratch_.c);
            }
            BlockGemm<T> block(scratch_, m, columns.count);
            block.holds_product();
            put(block, i, m, columns);
        }
    }

    const GemmScratch<T>& scratch_;
    const Weight& weight_;
    const bool decodes_;
    int64_t expert_, k_, first_, n_;
    const NextRows after_;
    AheadShape shape_{};
    int turn_ = 0;  // of the two blocks: the one that is packed

    // Where decoding is.
    struct Decoding {
        int64_t row, end;  // the next row, the end of the block
        int64_t room;      // with fewer pieces than this in the ring, another part fits
        Columns columns;
        char* to;
    } decoding_{};
};

}  // namespace kt::KT_ISA
