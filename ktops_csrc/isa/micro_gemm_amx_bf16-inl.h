#pragma once

// bfloat16 with AMX tiles: 32 rows x 2 panels as in isa/tiles_amx_bf16-inl.h, where 16 rows of a panel, in place, are a
// tile of B. Up to 16 rows by 4 panels: five loads and four products a step.
//
//   tmm0 .. tmm3    C: rows 0-15 x panel 0 .. 3
//   tmm4            A
//   tmm5            B: panel 0, 1, 2, 3
//
// A tile of A is 64 bytes of each of 16 rows, at any stride, so rows of a weight W are tiles in place. A band computes
// W . A^T that way, with A in panels: 32 rows by 2 panels, and by 3 panels with seven loads for six products,
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
#include "isa/pack_ahead_amx_bf16-inl.h"
#include "isa/panel-inl.h"
#include "isa/simd-inl.h"
#include "isa/tiles_amx_bf16-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Prefetches a tile of a panel, 16 consecutive lines.
inline __attribute__((always_inline)) void prefetch_tile(const void* tile) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_prefetch(static_cast<const char*>(tile) + 64 * i);
}

template <>
struct MicroGemm<bfloat16> {
    static constexpr int kRows = 32;
    static constexpr int64_t panels(int64_t m) { return m > 16 ? 2 : 4; }
    static constexpr bool kStaged = true, kReadsRows = true, kPacksAhead = true;
    using Ahead = AheadGemm;

    static void stage(const bfloat16* const* rows, int64_t m, int64_t k, bfloat16* out, const bfloat16** a) {
        copy_to_tiles(rows, m, k, out);
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
        multiply_tiles(g.m > 16, g.panels > 1,
                       {{g.a[0], g.a[0] + tiles * kTileElements},
                        kTileElements,
                        kTileK,
                        g.b,
                        g.b_stride,
                        kTileElements,
                        kTileK,
                        tiles,
                        {g.c, g.c + 16 * g.ldc},
                        16,
                        g.ldc,
                        g.accumulate},
                       ahead);
    }

    // Steps of ReadAhead in band() for every kBandK of k.
    static constexpr int64_t band_steps(int, int panels) { return panels > 2 ? 2 : 1; }
    // Blocks of k that stay in L1 while a band is multiplied by all panels: 32 rows of 512 bytes, beside two panels.
    static constexpr int64_t kBandBlock = 256;

    static void band(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        if (g.panels > 2) return g.halves > 1 ? three_panels<2>(g, ahead) : three_panels<1>(g, ahead);
        RowsAhead rows{ahead};
        multiply_tiles(g.halves > 1, g.panels > 1,
                       {{g.rows[0], g.rows[1]},
                        kTileK,
                        g.row_stride,
                        g.b,
                        g.b_stride,
                        kTileElements,
                        kTileK,
                        g.k / kTileK,
                        {g.tile(0, 0), g.tile(1, 0)},
                        kTileSums,
                        kPanelColumns,
                        g.accumulate},
                       rows);
    }

private:
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

    // M halves of a band by three panels.
    template <int M>
    static void three_panels(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        const int64_t stride = g.row_stride * static_cast<int64_t>(sizeof(bfloat16));
        constexpr unsigned kSums = M > 1 ? 0x3f : 7;
        const auto sums = [&](int i) { return g.tile(i / 3, i % 3); };
        start_sums<kSums>(g.accumulate, 64, sums);
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
        store_sums<kSums>(64, sums);
    }

    // 16 rows x P panels, P = 3 or 4.
    template <int P>
    static void row_kernel(const MicroArguments<bfloat16>& g) {
        const int64_t ldc = g.ldc * static_cast<int64_t>(sizeof(float)), tiles = g.k_steps / 16;
        constexpr unsigned kSums = P > 3 ? 15 : 7;
        const auto sums = [&](int i) { return g.c + 16 * i; };
        start_sums<kSums>(g.accumulate, ldc, sums);
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
        store_sums<kSums>(ldc, sums);
    }
};

}  // namespace kt::KT_ISA
