#pragma once

// bfloat16 with VDPBF16PS: zmm accumulators, one broadcast pair of A against one row of a panel.
//
//   registers  6 rows x 4 panels = 24 accumulators, 4 for a step of B, 1 for the broadcast of A
//              8 rows of a band x 2 or 3 panels = 16 or 24 accumulators, 16 rows x 1 panel; the same with W for A

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "core/bfloat16.h"
#include "isa/bands_avx512-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/pack_ahead_avx512_bf16-inl.h"
#include "isa/panel-inl.h"
#include "isa/products_avx512_bf16-inl.h"

namespace kt::KT_ISA {

template <>
struct MicroGemm<bfloat16> {
    static constexpr int kRows = 6;
    static constexpr int kPanels = 4;
    static constexpr int64_t panels(int64_t) { return kPanels; }  // for m rows
    static constexpr bool kStaged = false, kReadsRows = true, kPacksAhead = true;
    using Ahead = AheadGemm;

    static void gemm(const MicroArguments<bfloat16>& g) {
        call_micro_kernel<MicroGemm>(g, std::make_integer_sequence<int, kRows * kPanels>());
    }

    // Steps of ReadAhead in band() for every kBandK of k.
    static constexpr int64_t band_steps(int halves, int panels) { return halves * (panels > 1 ? 2 : 1); }
    // No blocks of k: eight rows of all of k are multiplied at a time.
    static constexpr int64_t kBandBlock = 0;

    static void band(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        if (g.panels == 1) return band_rows<16, 1>(g, ahead);
        g.panels == 2 ? band_rows<8, 2>(g, ahead) : band_rows<8, 3>(g, ahead);
    }

    template <int M, int P>
    static void kernel(const MicroArguments<bfloat16>& g) {
        __m512 acc[M][P];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P; ++j) {
                acc[i][j] = g.accumulate ? _mm512_loadu_ps(g.c + i * g.ldc + 16 * j) : _mm512_setzero_ps();
            }
        }
        const bfloat16* a[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) a[i] = g.a[i];
        const bfloat16* b = g.b;
        const int64_t a_step = g.a_step, b_stride = g.b_stride, a_end = g.k_steps * a_step;
        for (int64_t s = 0; s < a_end; s += a_step, b += 2 * kPanelColumns) {
            __m512bh panel[P];
#pragma GCC unroll 8
            for (int j = 0; j < P; ++j) panel[j] = load_bf16(b + j * b_stride);
            add_pairs(acc, panel, [&](int i) __attribute__((always_inline)) { return a[i] + s; });
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P; ++j) _mm512_storeu_ps(g.c + i * g.ldc + 16 * j, acc[i][j]);
        }
    }

private:
    template <int M, int P>
    static void band_rows(const BandArguments<bfloat16>& g, ReadAhead& ahead) {
        for (int half = 0; half < g.halves; ++half) {
            for (int64_t i = 0; i < kHalfRows; i += M) {
                multiply_band<M, P>(g, g.rows[half] + i * g.row_stride, g.tile(half, 0) + i * kPanelColumns, ahead);
            }
        }
    }

    // M rows of W by P panels.
    template <int M, int P>
    static void multiply_band(const BandArguments<bfloat16>& g, const bfloat16* w, float* tiles, ReadAhead& ahead) {
        constexpr int kApart = 3;  // rows from one pointer to the next; those between are at once or twice the stride
        __m512 acc[M][P];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
            for (int j = 0; j < P; ++j) {
                acc[i][j] =
                    g.accumulate ? _mm512_loadu_ps(tiles + j * kTileSums + i * kPanelColumns) : _mm512_setzero_ps();
            }
        }
        const auto stride = g.row_stride * static_cast<int64_t>(sizeof(bfloat16));
        constexpr int kPointers = (M + kApart - 1) / kApart;
        const char* rows[kPointers];
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) rows[i] = reinterpret_cast<const char*>(w) + kApart * i * stride;
        const bfloat16* b = g.b;
        const int64_t b_stride = g.b_stride;
        for (int64_t k = 0; k < g.k; k += kBandK) {
#pragma GCC unroll 4
            for (int64_t s = 0; s < kBandK; s += kPack<bfloat16>) {
                __m512bh panel[P];
#pragma GCC unroll 3
                for (int j = 0; j < P; ++j) panel[j] = load_bf16(b + j * b_stride);
                b += kPack<bfloat16> * kPanelColumns;
                add_pairs(acc, panel, [&](int i) __attribute__((always_inline)) {
                    return rows[i / kApart] + i % kApart * stride + s * 2;
                });
            }
#pragma GCC unroll 8
            for (int i = 0; i < kPointers; ++i) rows[i] += kBandK * sizeof(bfloat16);
            ahead.step();
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
            for (int j = 0; j < P; ++j) {
                _mm512_storeu_ps(tiles + j * kTileSums + i * kPanelColumns, acc[i][j]);
            }
        }
    }
};

}  // namespace kt::KT_ISA
