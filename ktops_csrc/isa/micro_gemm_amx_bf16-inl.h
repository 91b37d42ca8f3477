#pragma once

// bfloat16 with AMX tiles: 32 rows x 2 panels, TDPBF16PS.
//
//   tmm0 tmm1    C: rows 0-15  x panel 0, 1        16 x 16 float32 each
//   tmm2 tmm3       rows 16-31 x panel 0, 1
//   tmm4         A: rows 0-15, then rows 16-31     16 x 32 bfloat16
//   tmm5 tmm6    B: panel 0, 1                     16 pairs of k x 16 columns: 16 rows of a panel in place
//
// A step is 32 elements of k: four tile loads and four products. Up to 16 rows by 4 panels: five loads, four products.
//
//   tmm0 .. tmm3    C: rows 0-15 x panel 0 .. 3
//   tmm4            A
//   tmm5            B: panel 0, 1, 2, 3
//
// No kernel of these uses tmm7: a CPU may run short of tile registers (decision 7).
//
// A tile of A is 64 bytes of each of 16 rows, at any stride, so rows of a weight W are tiles in place. A band computes
// W . A^T that way, with A in panels: 32 rows by 2 panels as above, and by 3 panels with seven loads for six products,
//
//   tmm0 .. tmm2    rows 0-15 x panel 0 .. 2      tmm6    W: rows 0-15, then 16-31
//   tmm3 .. tmm5    rows 16-31                    tmm7    panel 0, 1, 2, 1, 0
//
// Other products have W in panels and A staged as tiles.

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/bands_avx512-inl.h"
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
    static constexpr bool kStaged = true, kReadsRows = true, kPacksAhead = false;
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
        const int64_t tiles = g.k_steps / 16;
        PanelAhead ahead;
        kernel(g.m > 16, g.panels > 1,
               {{g.a[0], g.a[0] + tiles * kTileElements},
                kTileElements,
                kTileK,
                g.b,
                g.b_stride,
                tiles,
                {g.c, g.c + 16 * g.ldc},
                16,
                g.ldc,
                g.accumulate},
               ahead);
    }

    // Steps of ReadAhead in band() for every kBandK of k.
    static constexpr int64_t band_steps(int, int panels) { return panels > 2 ? 2 : 1; }

    static void band(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        if (g.panels > 2) return g.halves > 1 ? three_panels<2>(g, ahead) : three_panels<1>(g, ahead);
        RowsAhead rows{ahead};
        kernel(g.halves > 1, g.panels > 1,
               {{g.rows[0], g.rows[1]},
                kTileK,
                g.row_stride,
                g.b,
                g.b_stride,
                g.k / kTileK,
                {g.tile(0, 0), g.tile(1, 0)},
                kTileSums,
                kPanelColumns,
                g.accumulate},
               rows);
    }

private:
    // Up to two tiles of rows of A by two panels. Strides are in elements, `right` is from a tile of C to the next.
    struct Operands {
        const bfloat16* a[2];
        int64_t a_step, a_stride;  // along k; from row to row
        const bfloat16* b;
        int64_t b_stride, steps;
        float* c[2];
        int64_t right, ldc;
        bool accumulate;
    };

    // What a step prefetches: panels that come from L2, or rows of a weight that come from memory.
    struct PanelAhead {
        static constexpr int64_t kSteps = 2;
        __attribute__((always_inline)) static void panel(const bfloat16* b) {
            prefetch_tile(b + kSteps * kTileElements);
        }
        static void step() {}
    };
    struct RowsAhead {
        ReadAhead& rows;
        static void panel(const bfloat16*) {}
        __attribute__((always_inline)) void step() { rows.step(); }
    };

    template <class Ahead>
    static void kernel(bool two_rows, bool two_panels, const Operands& g, Ahead& ahead) {
        if (two_rows) return two_panels ? kernel<2, 2>(g, ahead) : kernel<2, 1>(g, ahead);
        two_panels ? kernel<1, 2>(g, ahead) : kernel<1, 1>(g, ahead);
    }

    template <int M, int P, class Ahead>
    static void kernel(const Operands& g, Ahead& ahead) {
        const int64_t lda = g.a_stride * static_cast<int64_t>(sizeof(bfloat16));
        const int64_t ldc = g.ldc * static_cast<int64_t>(sizeof(float)), right = g.right;
        float *c0 = g.c[0], *c1 = g.c[1];
        TileRegion::settle(c0);
        if (g.accumulate) {
            _tile_loadd(0, c0, ldc);
            if constexpr (P > 1) _tile_loadd(1, c0 + right, ldc);
            if constexpr (M > 1) _tile_loadd(2, c1, ldc);
            if constexpr (M > 1 && P > 1) _tile_loadd(3, c1 + right, ldc);
        } else {
            zero_sums();
        }
        const bfloat16* b = g.b;
        for (int64_t t = 0; t < g.steps; ++t, b += kTileElements) {
            _tile_loadd(4, g.a[0] + t * g.a_step, lda);
            _tile_loadd(5, b, 64);
            ahead.panel(b);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (P > 1) _tile_loadd(6, b + g.b_stride, 64);
            if constexpr (P > 1) ahead.panel(b + g.b_stride);
            if constexpr (P > 1) _tile_dpbf16ps(1, 4, 6);
            if constexpr (M > 1) _tile_loadd(4, g.a[1] + t * g.a_step, lda);
            if constexpr (M > 1) _tile_dpbf16ps(2, 4, 5);
            if constexpr (M > 1 && P > 1) _tile_dpbf16ps(3, 4, 6);
            ahead.step();
        }
        _tile_stored(0, c0, ldc);
        if constexpr (P > 1) _tile_stored(1, c0 + right, ldc);
        if constexpr (M > 1) _tile_stored(2, c1, ldc);
        if constexpr (M > 1 && P > 1) _tile_stored(3, c1 + right, ldc);
        TileRegion::settle(c0);
    }

    // M halves of a band by three panels.
    template <int M>
    static void three_panels(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        const int64_t stride = g.row_stride * static_cast<int64_t>(sizeof(bfloat16));
        TileRegion::settle(g.tiles);
        if (g.accumulate) {
            _tile_loadd(0, g.tile(0, 0), 64);
            _tile_loadd(1, g.tile(0, 1), 64);
            _tile_loadd(2, g.tile(0, 2), 64);
            if constexpr (M > 1) _tile_loadd(3, g.tile(1, 0), 64);
            if constexpr (M > 1) _tile_loadd(4, g.tile(1, 1), 64);
            if constexpr (M > 1) _tile_loadd(5, g.tile(1, 2), 64);
        } else {
            zero_sums();
            if constexpr (M > 1) _tile_zero(4);
            if constexpr (M > 1) _tile_zero(5);
        }
        const bfloat16* b = g.b;
        for (int64_t k = 0; k < g.k; k += kTileK, b += kTileElements) {
            _tile_loadd(6, g.rows[0] + k, stride);
            _tile_loadd(7, b, 64);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(7, b + g.b_stride, 64);
            _tile_dpbf16ps(1, 6, 7);
            _tile_loadd(7, b + 2 * g.b_stride, 64);
            _tile_dpbf16ps(2, 6, 7);
            ahead.step();
            if constexpr (M > 1) {
                _tile_loadd(6, g.rows[1] + k, stride);
                _tile_dpbf16ps(5, 6, 7);
                _tile_loadd(7, b + g.b_stride, 64);
                _tile_dpbf16ps(4, 6, 7);
                _tile_loadd(7, b, 64);
                _tile_dpbf16ps(3, 6, 7);
            }
            ahead.step();
        }
        _tile_stored(0, g.tile(0, 0), 64);
        _tile_stored(1, g.tile(0, 1), 64);
        _tile_stored(2, g.tile(0, 2), 64);
        if constexpr (M > 1) _tile_stored(3, g.tile(1, 0), 64);
        if constexpr (M > 1) _tile_stored(4, g.tile(1, 1), 64);
        if constexpr (M > 1) _tile_stored(5, g.tile(1, 2), 64);
        TileRegion::settle(g.tiles);
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
