#pragma once

// kRowBands: products along the rows of W, a band of them after the other, in place or decoded, with A in panels.
//
// A is packed once for all bands. While a band is multiplied, the next one is prefetched: each line of W comes from
// memory once, and memory and arithmetic overlap.

#include "gemm/scratch-inl.h"
#include "isa/bands-inl.h"
#include "isa/direct-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

// The product added to that of a band: rows [k] of `a` times rows of `factor`, as LoRA has them. rank 0: none.
template <class T, class Factor>
struct AddedProduct {
    Rows<T> a;
    int64_t rank = 0;
    const Factor* factor = nullptr;
};

template <class T, class Weight, class Factor>
class RowBands {
    using Micro = MicroGemm<T>;
    static constexpr auto kBytes = static_cast<int64_t>(sizeof(T));

public:
    // w: an expert's rows of `weight`, k columns. after: rows that the thread probably needs next.
    RowBands(const GemmScratch<T>& scratch, const Rows<T>& a, int64_t rows, int64_t k, const Weight& weight,
             int64_t expert, const AddedProduct<T, Factor>& added, const NextRows& after)
        : scratch_(scratch),
          a_(a),
          rows_(rows),
          k_(k),
          weight_(weight),
          expert_(expert),
          added_(added),
          after_(after),
          rank_(round_up(added.rank, kBandK)),
          stride_(panel_elements<T>(k) + kPadding),
          low_stride_(panel_elements<T>(rank_)) {}

    // Computes bands of at most kBandRows columns of C: band(j) for j = 0, step, .. < n returns the rows of W of one.
    // Calls put(i, count, j, columns, c, ldc), where row c + t * ldc is row i + t of C, columns.total() elements.
    template <class Band, class Put>
    void multiply(int64_t n, int64_t step, Band band, Put put) {
        const int64_t most = kBandBytes / kBytes / (stride_ + low_stride_) * kPanelColumns;
        const int64_t blocks = ceil_div(rows_, most), size = round_up(ceil_div(rows_, blocks), kPanelColumns);
        for (int64_t i = 0; i < rows_; i += size) {
            const int64_t m = smaller(size, rows_ - i), panels = ceil_div(m - left_over(m), kPanelColumns);
            pack(i, m);
            for (int64_t j = 0; j < n; j += step) {
                const bool is_last = j + step >= n && i + size >= rows_;
                if (!is_last) {
                    read_ahead(expert_, band(j + step < n ? j + step : 0), panels);
                } else if (after_.expert >= 0) {
                    Columns next = band(0);
                    if (next.second >= 0) next.second += after_.row - next.first;
                    next.first = after_.row;
                    read_ahead(after_.expert, next, panels);
                } else {
                    ahead_ = {};
                }
                multiply_band(i, m, j, band(j), put);
            }
        }
    }

private:
    // The last rows of A that are multiplied as dot products, since they would fill too little of a panel.
    static int64_t left_over(int64_t m) {
        const int64_t rows = m % kPanelColumns;
        return m > 2 * kPanelColumns && rows <= Isa::kMostLeftOver ? rows : 0;
    }

    static constexpr int64_t kPadding = 64 / kBytes;
    static constexpr int64_t kTiles = 2 * kBandPanels * kTileSums;
    // Rows this many bytes apart, or a multiple of it, share a few sets of L1.
    static constexpr int64_t kSharedSets = 2048;
    static_assert(!Micro::kBandBlock ||
                  kBandBytes / kBytes / (Micro::kBandBlock * kPanelColumns) / 2 * kTiles <= ahead_sums<T>());
    // In scratch.stage: the tiles of sums, their transposes, and the rows of the factor of the added product.
    float* tiles() const { return reinterpret_cast<float*>(scratch_.stage); }
    float* block() const { return tiles() + kTiles; }
    T* factor_panel() const { return reinterpret_cast<T*>(block() + kTiles); }
    T* factor_rows(int half) const { return factor_panel() + (1 + half) * low_stride_; }

    void pack(int64_t first, int64_t m) const {
        T* low = low_panels(m);
        for (int64_t j = 0; j < m; j += kPanelColumns) {
            const int64_t n = smaller(kPanelColumns, m - j), p = j / kPanelColumns;
            if (j + left_over(m) < m) pack_rows(a_, first + j, n, k_, scratch_.panels + p * stride_);
            pack_columns(n, rank_, low + p * low_stride_, [&](int64_t i, int64_t k, int64_t, T* to) {
                std::memset(static_cast<void*>(to), 0, 64);
                const int64_t count = smaller(kBandK, added_.rank - k);
                std::memcpy(static_cast<void*>(to), added_.a.row(first + j + i) + k,
                            static_cast<size_t>(count * kBytes));
            });
        }
    }
    T* low_panels(int64_t m) const { return scratch_.panels + ceil_div(m, kPanelColumns) * stride_; }

    // Calls f(half, first row, number of rows) for the halves of a band.
    template <class F>
    static void for_each_half(const Columns& columns, F f) {
        f(0, columns.first, smaller(kHalfRows, columns.count));
        if (columns.second >= 0) {
            f(1, columns.second, columns.count);
        } else if (columns.count > kHalfRows) {
            f(1, columns.first + kHalfRows, columns.count - kHalfRows);
        }
    }

    // Prefetches a band, if its rows are used in place, while the one before it is multiplied by that many panels.
    void read_ahead(int64_t expert, const Columns& columns, int64_t panels) {
        if (!weight_.direct(expert)) return;
        const char* first[2] = {};
        int64_t rows = 0, steps = 0;
        for_each_half(columns, [&](int half, int64_t row, int64_t n) {
            first[half] = reinterpret_cast<const char*>(weight_.direct(expert) + row * weight_.row_stride);
            rows = larger(rows, n);
        });
        for_each_group(panels, [&](int64_t, int count) { steps += Micro::band_steps(first[1] ? 2 : 1, count); });
        ahead_.start(first, rows, k_ * kBytes, weight_.row_stride * kBytes, steps * (k_ / kBandK));
    }

    // Panels two at a time, three at the end of an odd number.
    template <class F>
    static void for_each_group(int64_t panels, F f) {
        for (int64_t p = 0; p < panels;) {
            const int count = panels - p == kBandPanels ? kBandPanels : static_cast<int>(smaller(2, panels - p));
            f(p, count);
            p += count;
        }
    }

    // Elements of k that a band is multiplied by at a time. A block of its rows stays in L1 for all panels, unless
    // lines that are a power of two apart share too few sets; the sums of all panels are kept meanwhile.
    static int64_t block_of(const BandArguments<T>& band, int64_t panels) {
        const bool fits = panels > kBandPanels && band.row_stride * kBytes % kSharedSets != 0;
        if (!Micro::kBandBlock || !fits || band.k <= Micro::kBandBlock) return band.k;
        return round_up(ceil_div(band.k, ceil_div(band.k, Micro::kBandBlock)), kBandK);
    }

    template <class Put>
    void multiply_band(int64_t i, int64_t m, int64_t j, const Columns& columns, Put put) {
        BandArguments<T> rows = rows_of(columns), low{};
        if (rank_) low = factor_of(columns);
        const int64_t ldc = columns.total(), left = left_over(m), panels = ceil_div(m - left, kPanelColumns);
        const int64_t block_k = block_of(rows, panels);
        for (int64_t k = 0; k < k_; k += block_k) {
            BandArguments<T> part = rows;
            for (int half = 0; half < part.halves; ++half) part.rows[half] += k;
            part.k = smaller(block_k, k_ - k);
            part.accumulate = k > 0;
            for_each_group(panels, [&](int64_t p, int count) {
                part.panels = low.panels = count;
                part.b = scratch_.panels + p * stride_ + k * kPanelColumns;
                if (block_k < k_) part.tiles = low.tiles = scratch_.sums + p / 2 * kTiles;
                Micro::band(part, ahead_);
                if (k + block_k < k_) return;
                low.accumulate = true;
                multiply_low(low, low_panels(m) + p * low_stride_);
                transpose(part, columns, block());
                const int64_t first = p * kPanelColumns;
                put(i + first, smaller(count * kPanelColumns, m - first), j, columns, block(), ldc);
            });
        }
        if (!left) return;
        dots(i + m - left, left, rows, columns);
        if (rank_) {
            low.panels = 1;
            low.accumulate = false;
            multiply_low(low, low_panels(m) + m / kPanelColumns * low_stride_);
            float* sums = block() + kTiles / 2;
            transpose(low, columns, sums);
            for (int64_t t = 0; t < left * ldc; ++t) block()[t] += sums[t];
        }
        put(i + m - left, left, j, columns, block(), ldc);
    }

    // Adds or writes the added product, `b` its panels, to the tiles.
    void multiply_low(BandArguments<T> g, const T* b) const {
        g.k = kBandK;
        for (int64_t k = 0; k < rank_; k += kBandK, g.accumulate = true) {
            g.b = b + k * kPanelColumns;
            ReadAhead none;
            Micro::band(g, none);
            for (int half = 0; half < g.halves; ++half) g.rows[half] += kBandK * kHalfRows;
        }
    }

    static void transpose(const BandArguments<T>& g, const Columns& columns, float* c) {
        for_each_half(columns, [&](int half, int64_t, int64_t n) {
            put_band(g, half, n, c + half * kHalfRows, columns.total());
        });
    }

    // Writes rows [first, first + m) of A times the band to block().
    void dots(int64_t first, int64_t m, const BandArguments<T>& band, const Columns& columns) const {
        const T* rows[kPanelColumns];
        for (int64_t t = 0; t < m; ++t) rows[t] = a_.row(first + t);
        for_each_half(columns, [&](int half, int64_t, int64_t n) {
            const T* w = band.rows[half] + (kHalfRows - n) * band.row_stride;
            Direct<T>::dots(rows, m, w, band.row_stride, n, k_, block() + half * kHalfRows, columns.total());
        });
    }

    BandArguments<T> arguments(const Columns& columns) const {
        BandArguments<T> g{};
        for_each_half(columns, [&](int half, int64_t, int64_t) { g.halves = half + 1; });
        g.tiles = tiles();
        return g;
    }

    // Where fewer than 16 rows are left, a half includes rows before them.
    BandArguments<T> rows_of(const Columns& columns) const {
        BandArguments<T> g = arguments(columns);
        const T* w = weight_.direct(expert_);
        // Not a power of two, or the lines of decoded rows would share a few sets of the cache.
        g.row_stride = w ? weight_.row_stride : k_ + kPadding;
        g.b_stride = stride_;
        g.k = k_;
        for_each_half(columns, [&](int half, int64_t row, int64_t n) {
            row -= kHalfRows - n;
            if (w) {
                g.rows[half] = w + row * g.row_stride;
            } else {
                T* decoded = scratch_.decoded_rows() + half * kHalfRows * g.row_stride;
                weight_.decode_rows(expert_, row, kHalfRows, 0, k_, decoded, g.row_stride);
                g.rows[half] = decoded;
            }
        });
        return g;
    }

    // The rows of the added product's factor, as tiles [rank / 32][16][32] of each half.
    BandArguments<T> factor_of(const Columns& columns) const {
        BandArguments<T> g = arguments(columns);
        g.row_stride = kBandK;
        g.b_stride = low_stride_;
        for_each_half(columns, [&](int half, int64_t row, int64_t n) {
            T* panel = factor_panel();
            T* tiles = factor_rows(half);
            std::memset(static_cast<void*>(panel), 0, static_cast<size_t>(low_stride_ * kBytes));
            added_.factor->decode_nt(expert_, row - (kHalfRows - n), kHalfRows, 0, added_.rank, panel, low_stride_,
                                     nullptr);
            for (int64_t k = 0; k < low_stride_; k += kBandK * kPanelColumns) {
                transpose_16x16(reinterpret_cast<const char*>(panel + k), 64, reinterpret_cast<uint32_t*>(tiles + k));
            }
            g.rows[half] = tiles;
        });
        return g;
    }

    const GemmScratch<T>& scratch_;
    const Rows<T> a_;
    const int64_t rows_, k_;
    const Weight& weight_;
    const int64_t expert_;
    const AddedProduct<T, Factor> added_;
    const NextRows after_;
    const int64_t rank_, stride_, low_stride_;
    ReadAhead ahead_;
};

// Writes the block of C = A . W^T.
template <class T, class Weight>
inline void row_bands(const Block<T>& block, const Rows<T>& a, int64_t k, const Weight& weight, int64_t expert,
                      const Columns& columns) {
    for_each_range(columns, block.row(0), [&](int64_t row, Acc<T>* c) {
        RowBands<T, Weight, Weight> bands(block.scratch, a, block.rows, k, weight, expert, {}, {});
        const auto band = [&](int64_t j) { return Columns{row + j, smaller(kBandRows, columns.count - j)}; };
        const auto put = [&](int64_t i, int64_t n, int64_t j, const Columns& part, const Acc<T>* from, int64_t ld) {
            for (int64_t t = 0; t < n; ++t) {
                for_each_vector<Acc<T>>(part.count, [&](int64_t v, int64_t count) {
                    store_n(c + (i + t) * block.columns + j + v, load(from + t * ld + v), count);
                });
            }
        };
        bands.multiply(columns.count, kBandRows, band, put);
    });
}

}  // namespace kt::KT_ISA
