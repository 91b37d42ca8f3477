#pragma once

// Products with panels of bfloat16 while the next ones are packed: A in tiles, 32 columns of B. Two tiles of A are
// multiplied as in isa/tiles_amx_bf16-inl.h, and three at the end of an odd number, with seven loads for six products:
//
//   tmm0 tmm1 tmm2    C: tile 0, 1, 2 x columns 0-15      tmm6    A: tile 0, 1, 2, then 1, 0
//   tmm3 tmm4 tmm5       tile 0, 1, 2 x columns 16-31     tmm7    B: columns 0-15, then 16-31
//
// Every other line of a group of panels, 16 of them, is a tile of B.

#include <immintrin.h>

#include "isa/pack_ahead_avx512-inl.h"
#include "isa/tiles_amx_bf16-inl.h"

namespace kt::KT_ISA {

struct AheadGemm {
    static constexpr int kRows = 48, kGroups = 1;
    static constexpr int64_t kStep = kTileK, kRowsAhead = 16, kMostRows = 256;
    static constexpr bool kStaged = true;

    // Blocks of whole rows, as far as their sums fit in 512 KiB, so that W is read in order. Two blocks, the sums and
    // the tiles of A take 1.2 MiB of L2.
    static constexpr int64_t kBlockElements = 128 << 10, kSums = 128 << 10, kMostColumns = kMostAheadColumns;
    static constexpr int64_t kStagedElements = 64 << 10;
    static AheadShape shape(int64_t rows, int64_t columns, bool) {
        const int64_t padded = round_up(rows, 16);
        const AheadShape shape = ahead_shape(columns, kSums / padded, kBlockElements, kStep);
        return {shape.columns, smaller(shape.k, kStagedElements / padded / kStep * kStep)};
    }

    // Calls f(first, count) for the rows of each multiply().
    template <class F>
    static void for_each_part(int64_t m, F f) {
        for (int64_t i = 0; i < m;) {
            const int64_t left = m - i, count = left > 32 && left <= kRows ? left : smaller(32, left);
            f(i, count);
            i += count;
        }
    }

    // Steps of PackAhead in multiply().
    static int64_t steps(int64_t m, int64_t k) { return k / kStep * (m > 32 ? 2 : 1); }

    // Copies rows of A to tiles.
    static void stage(const bfloat16* const* rows, int64_t m, int64_t k, bfloat16* tiles) {
        copy_to_tiles(rows, m, k, tiles);
    }

    static void finish(PackAhead& p) { pack_rest(p); }

    // Where the sums of rows from i on and of a group start, of m rows: [groups][m / 16][2][16][16].
    static int64_t sums_at(int64_t i, int64_t group, int64_t m, int64_t) {
        return (group * ceil_div(m, 16) + i / 16) * kGroupSums;
    }

    // The sums of one group, m <= kRows rows, (+)= A . its panels. a: tiles [rows / 16][k / 32][16][32].
    static void multiply(int m, int, const bfloat16* const* a, const bfloat16* b, int64_t, int64_t k, float* c, int64_t,
                         bool accumulate, PackAhead& packing) {
        if (m > 32) return three_tiles(a[0], b, k, c, accumulate, packing);
        Packs packs{packing};
        const bfloat16* second = a[0] + 16 * k;
        multiply_tiles(m > 16, true,
                       {{a[0], second},
                        kTileElements,
                        kTileK,
                        b,
                        kAheadColumns,
                        kTileK * kAheadColumns,
                        2 * kAheadColumns,
                        k / kTileK,
                        {c, c + kGroupSums},
                        kTileSums,
                        16,
                        accumulate},
                       packs);
    }

    // Copies the sums of m rows and `columns` columns from a group on to rows of C.
    static void put_sums(const float* sums, int64_t m, int64_t columns, float* c) {
        for (int64_t j = 0; j < columns; j += kAheadColumns) {
            for (int64_t i = 0; i < m; ++i) {
                const float* from = sums + sums_at(i, j / kAheadColumns, m, 0) + i % 16 * 16;
                const __m512 pair[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kTileSums)};
                store_column_sums(c + i * columns + j, kAheadColumns, pair);
            }
        }
    }

private:
    static constexpr int64_t kTileSums = 16 * 16, kGroupSums = 2 * kTileSums;

    struct Packs {
        PackAhead& packing;
        static void panel(const bfloat16*) {}
        __attribute__((always_inline)) void step() {
            packing.at.pace.step([&]() __attribute__((always_inline)) { pack_piece(packing, packing.at); });
        }
    };

    static void three_tiles(const bfloat16* a, const bfloat16* b, int64_t k, float* c, bool accumulate,
                            PackAhead& packing) {
        constexpr int64_t ldb = 4 * kAheadColumns;
        Packs packs{packing};
        const auto sums = [&](int i) { return c + i % 3 * kGroupSums + i / 3 * kTileSums; };
        start_sums<0x3f>(accumulate, 64, sums);
        for (int64_t s = 0; s < k; s += kTileK, a += kTileElements, b += kTileK * kAheadColumns) {
            _tile_loadd(7, b, ldb);
            _tile_loadd(6, a, 64);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(6, a + 16 * k, 64);
            _tile_dpbf16ps(1, 6, 7);
            _tile_loadd(6, a + 32 * k, 64);
            _tile_dpbf16ps(2, 6, 7);
            packs.step();
            _tile_loadd(7, b + kAheadColumns, ldb);
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(6, a + 16 * k, 64);
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(6, a, 64);
            _tile_dpbf16ps(3, 6, 7);
            packs.step();
        }
        store_sums<0x3f>(64, sums);
    }
};

}  // namespace kt::KT_ISA
