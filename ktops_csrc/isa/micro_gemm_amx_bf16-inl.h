#pragma once

// bfloat16 with AMX tiles: 32 rows x 2 panels, TDPBF16PS.
//
//   tmm0 tmm1    C: rows 0-15  x panel 0, 1        16 x 16 float32 each
//   tmm2 tmm3       rows 16-31 x panel 0, 1
//   tmm4         A: rows 0-15, then rows 16-31     16 x 32 bfloat16
//   tmm5 tmm6    B: panel 0, 1                     16 pairs of k x 16 columns: 16 rows of a panel in place
//
// A step is 32 elements of k: four tile loads and four products. Up to 16 rows by 4 panels, or 64 rows by one:
// five loads, four products. No kernel uses tmm7: a CPU may run short of tile registers (decision 7).
//
//   tmm0 .. tmm3    C: rows 0-15 x panel 0 .. 3    or rows 0-15 .. 48-63 x panel 0
//   tmm4            A                                 B
//   tmm5            B: panel 0, 1, 2, 3               A: rows 0-15 .. 48-63
//
// A tile of A is 64 bytes of each of 16 rows, at any stride, so rows of a weight W are tiles in place. A . W^T is
// summed as W . A^T, with A in panels and C transposed. Other products have W in panels and A staged as tiles.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/panel-inl.h"
#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Configures eight tiles of 16 rows of 64 bytes on this thread, from construction to destruction.
struct TileRegion {
    TileRegion() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        settle(&config);
        _tile_loadconfig(&config);
    }
    ~TileRegion() { _tile_release(); }

    // Makes the compiler finish its stores, since it does not know which memory tile instructions read.
    static void settle(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }
};

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Prefetches a tile of a panel, 16 consecutive lines.
inline __attribute__((always_inline)) void prefetch_tile(const void* tile) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_prefetch(static_cast<const char*>(tile) + 64 * i);
}

template <>
struct MicroGemm<bfloat16> {
    static constexpr int kRows = 32;
    static constexpr int64_t panels(int64_t m) { return m > 16 ? 2 : 4; }
    static constexpr bool kStaged = true, kReadsRows = true;
    static constexpr int64_t kTileK = 32, kTileElements = 16 * kTileK;

    // Copies A to tiles [rows / 16][k / 32][16][32], with zeros past the last element of k. Rows past m are left as
    // they are, since they only affect rows of C past m.
    static void stage(const bfloat16* const* rows, int64_t m, int64_t k, bfloat16* out, const bfloat16** a) {
        const int64_t tiles = ceil_div(k, kTileK);
        for (int64_t i = 0; i < m; ++i) {
            bfloat16* to = out + i / 16 * tiles * kTileElements + i % 16 * kTileK;
            const bfloat16* row = rows[i];
            for (int64_t t = 0; t + 1 < tiles; ++t) {
                _mm512_store_si512(to + t * kTileElements, _mm512_loadu_si512(row + t * kTileK));
            }
            const auto left = static_cast<uint32_t>(k - (tiles - 1) * kTileK);
            const __mmask32 mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
            _mm512_store_si512(to + (tiles - 1) * kTileElements,
                               _mm512_maskz_loadu_epi16(mask, row + (tiles - 1) * kTileK));
        }
        a[0] = out;
    }

    // Copies rows i .. i + m of A, which are columns of panels: 16 pairs of k of a panel, transposed, form a tile.
    static void stage_panels(const bfloat16* panels, int64_t stride, int64_t i, int64_t m, bfloat16* out,
                             const bfloat16** a) {
        a[0] = out;
        for (int64_t p = i / kPanelColumns; p * kPanelColumns < i + m; ++p) {
            const bfloat16* panel = panels + p * stride;
            for (int64_t k = 0; k < stride; k += kTileElements, out += kTileElements) {
                transpose_16x16(reinterpret_cast<const char*>(panel + k), 64, reinterpret_cast<uint32_t*>(out));
            }
        }
    }

    static void gemm(const MicroArguments<bfloat16>& g) {
        if (g.m <= 16 && g.panels > 2) return g.panels > 3 ? row_kernel<4>(g) : row_kernel<3>(g);
        kernel({g.a[0], g.a[0] + g.k_steps / 16 * kTileElements, kTileElements, kTileK}, g, {});
    }

    // C[i][j] = row j of w . column i of the panels, i < m <= 256, j < n. k is a multiple of kTileK. At least 16 rows
    // of w end at row n: some may come before row 0.
    static void multiply_rows(const bfloat16* w, int64_t row_stride, int64_t n, const bfloat16* panels,
                              int64_t panel_stride, int64_t m, int64_t k, float* c, int64_t ldc) {
        alignas(64) float sums[32 * 32];
        // The tile of fewer than 16 remaining rows includes rows before them.
        const auto tile = [&](int64_t j) { return w + smaller(j, n - 16) * row_stride; };
        const auto put = [&](const float* from, int64_t ld, int64_t i, int64_t j) {
            if (i < m && j < n) put_transposed(from, ld, smaller(16, m - i), smaller(16, n - j), c + i * ldc + j, ldc);
        };
        // 32 rows of w by two panels, and 64 by a last single panel. Meanwhile prefetches the same number of rows after
        // them; if they are used only once, first the same rows further along k.
        const int64_t num_panels = ceil_div(m, 16), steps = k / kTileK;
        const bool single = num_panels > 1 && num_panels % 2;
        const int64_t passes = single ? num_panels / 2 : ceil_div(num_panels, 2);
        const int64_t w_rows = single ? 64 : 32, calls = single ? 2 * passes + 1 : passes;
        for (int64_t j = 0; j < n; j += w_rows) {
            ReadAhead ahead{nullptr, w + (j + w_rows) * row_stride, 0, w_rows / calls, row_stride};
            const auto two_panels = [&](int64_t row) {
                if (num_panels <= 2) {
                    ahead = {tile(row) + kAhead * kTileK, w + (row + 32) * row_stride + (kAhead - steps) * kTileK,
                             steps - kAhead, 32, row_stride};
                }
                for (int64_t pass = 0; pass < passes; ++pass, ahead.far += ahead.rows * row_stride) {
                    const int64_t i = 32 * pass;
                    kernel({tile(row), tile(row + 16), kTileK, row_stride},
                           {n - row > 16 ? 32 : 16, m - i > 16 ? 2 : 1, nullptr, 0, panels + 2 * pass * panel_stride,
                            panel_stride, k / 2, sums, 32, false},
                           ahead);
                    for (int64_t q = 0; q < 32; q += 16) {
                        for (int64_t p = 0; p < 32; p += 16) put(sums + q * 32 + p, 32, i + p, row + q);
                    }
                }
            };
            two_panels(j);
            if (!single) continue;
            if (j + 32 < n) two_panels(j + 32);
            const bfloat16* tiles[] = {tile(j), tile(j + 16), tile(j + 32), tile(j + 48)};
            column_kernel(tiles, row_stride, panels + 2 * passes * panel_stride, steps, sums, ahead);
            for (int64_t q = 0; q < 64; q += 16) put(sums + q * 16, 16, 32 * passes, j + q);
        }
    }

private:
    static constexpr int64_t kAhead = 8;       // steps, where rows of a weight come from memory
    static constexpr int64_t kPanelAhead = 2;  // steps, where panels come from L2

    // Tiles of A: `first` has rows 0-15, `second` rows 16-31; `step` elements to the next along k, rows `stride` apart.
    struct TilesOfA {
        const bfloat16 *first, *second;
        int64_t step, stride;
    };

    // Prefetches to L2 during the steps, a line of each of `rows` rows per step: of `near` before step far_from, then
    // of `far`.
    struct ReadAhead {
        const bfloat16 *near = nullptr, *far = nullptr;
        int64_t far_from = 0, rows = 0, stride = 0;

        __attribute__((always_inline)) void step(int64_t t) const {
            const bfloat16* line = (t < far_from ? near : far) + t * kTileK;
            for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(line + i * stride, 0, 2);
        }
    };

    static void kernel(const TilesOfA& a, const MicroArguments<bfloat16>& g, const ReadAhead& ahead) {
        if (g.m > 16) return g.panels > 1 ? kernel<2, 2>(a, g, ahead) : kernel<2, 1>(a, g, ahead);
        return g.panels > 1 ? kernel<1, 2>(a, g, ahead) : kernel<1, 1>(a, g, ahead);
    }

    template <int M, int P>
    static void kernel(const TilesOfA& a, const MicroArguments<bfloat16>& g, const ReadAhead& ahead) {
        const int64_t ldc = g.ldc * static_cast<int64_t>(sizeof(float)), tiles = g.k_steps / 16;
        float* c00 = g.c;
        float* c10 = g.c + 16 * g.ldc;
        TileRegion::settle(c00);
        if (g.accumulate) {
            _tile_loadd(0, c00, ldc);
            if constexpr (P > 1) _tile_loadd(1, c00 + 16, ldc);
            if constexpr (M > 1) _tile_loadd(2, c10, ldc);
            if constexpr (M > 1 && P > 1) _tile_loadd(3, c10 + 16, ldc);
        } else {
            zero_sums();
        }
        const int64_t lda = a.stride * static_cast<int64_t>(sizeof(bfloat16));
        const bfloat16* b0 = g.b;
        const bfloat16* b1 = b0 + g.b_stride;
        for (int64_t t = 0; t < tiles; ++t) {
            _tile_loadd(4, a.first + t * a.step, lda);
            _tile_loadd(5, b0 + t * kTileElements, 64);
            prefetch_tile(b0 + (t + kPanelAhead) * kTileElements);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (P > 1) _tile_loadd(6, b1 + t * kTileElements, 64);
            if constexpr (P > 1) prefetch_tile(b1 + (t + kPanelAhead) * kTileElements);
            if constexpr (P > 1) _tile_dpbf16ps(1, 4, 6);
            if constexpr (M > 1) _tile_loadd(4, a.second + t * a.step, lda);
            if constexpr (M > 1) _tile_dpbf16ps(2, 4, 5);
            if constexpr (M > 1 && P > 1) _tile_dpbf16ps(3, 4, 6);
            ahead.step(t);
        }
        _tile_stored(0, c00, ldc);
        if constexpr (P > 1) _tile_stored(1, c00 + 16, ldc);
        if constexpr (M > 1) _tile_stored(2, c10, ldc);
        if constexpr (M > 1 && P > 1) _tile_stored(3, c10 + 16, ldc);
    }

    // Four tiles of rows of A by one panel: C[64][16], contiguous.
    static void column_kernel(const bfloat16* const* a, int64_t row_stride, const bfloat16* b, int64_t steps, float* c,
                              const ReadAhead& ahead) {
        const int64_t lda = row_stride * static_cast<int64_t>(sizeof(bfloat16));
        TileRegion::settle(c);
        zero_sums();
        for (int64_t t = 0; t < steps; ++t, b += kTileElements) {
            _tile_loadd(4, b, 64);
            prefetch_tile(b + kPanelAhead * kTileElements);
            _tile_loadd(5, a[0] + t * kTileK, lda);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(5, a[1] + t * kTileK, lda);
            _tile_dpbf16ps(1, 5, 4);
            _tile_loadd(5, a[2] + t * kTileK, lda);
            _tile_dpbf16ps(2, 5, 4);
            _tile_loadd(5, a[3] + t * kTileK, lda);
            _tile_dpbf16ps(3, 5, 4);
            ahead.step(t);
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        _tile_stored(2, c + 512, 64);
        _tile_stored(3, c + 768, 64);
    }

    // Stores the transpose of a 16 x 16 block of sums: the last `columns` columns of its first `rows` rows.
    static void put_transposed(const float* sums, int64_t ld, int64_t rows, int64_t columns, float* c, int64_t ldc) {
        TileRegion::settle(sums);
        alignas(64) uint32_t block[16 * 16];
        transpose_16x16(reinterpret_cast<const char*>(sums), ld * static_cast<int64_t>(sizeof(float)), block);
        for (int64_t i = 0; i < rows; ++i) {
            const auto* row = reinterpret_cast<const float*>(block) + 16 * i + 16 - columns;
            store_n(c + i * ldc, load_n(row, columns), columns);
        }
    }

    // 16 rows x P panels, P = 3 or 4.
    template <int P>
    static void row_kernel(const MicroArguments<bfloat16>& g) {
        const int64_t ldc = g.ldc * static_cast<int64_t>(sizeof(float)), tiles = g.k_steps / 16;
        TileRegion::settle(g.c);
        if (g.accumulate) {
            _tile_loadd(0, g.c, ldc);
            _tile_loadd(1, g.c + 16, ldc);
            _tile_loadd(2, g.c + 32, ldc);
            if constexpr (P > 3) _tile_loadd(3, g.c + 48, ldc);
        } else {
            zero_sums();
        }
        const bfloat16* a = g.a[0];
        const bfloat16* b = g.b;
        for (int64_t t = 0; t < tiles; ++t, a += kTileElements, b += kTileElements) {
            _tile_loadd(4, a, 64);
            _tile_loadd(5, b, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(5, b + g.b_stride, 64);
            _tile_dpbf16ps(1, 4, 5);
            _tile_loadd(5, b + 2 * g.b_stride, 64);
            _tile_dpbf16ps(2, 4, 5);
            if constexpr (P > 3) _tile_loadd(5, b + 3 * g.b_stride, 64);
            if constexpr (P > 3) _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, g.c, ldc);
        _tile_stored(1, g.c + 16, ldc);
        _tile_stored(2, g.c + 32, ldc);
        if constexpr (P > 3) _tile_stored(3, g.c + 48, ldc);
    }
};

}  // namespace kt::KT_ISA
