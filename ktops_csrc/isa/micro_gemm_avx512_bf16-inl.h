#pragma once

// bfloat16 with VDPBF16PS: zmm accumulators, one broadcast pair of A against one row of a panel.
//
//   registers  6 rows x 4 panels = 24 accumulators, 4 for a step of B, 1 for the broadcast of A

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "core/bfloat16.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

inline __m512bh load_bf16(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

template <>
struct MicroGemm<bfloat16> {
    static constexpr int kRows = 6;
    static constexpr int kPanels = 4;
    static constexpr int64_t panels(int64_t) { return kPanels; }  // for m rows
    static constexpr bool kStaged = false, kReadsRows = false;

    static void gemm(const MicroArguments<bfloat16>& g) {
        call_micro_kernel<MicroGemm>(g, std::make_integer_sequence<int, kRows * kPanels>());
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
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(read(reinterpret_cast<const int32_t*>(a[i] + s)));
#pragma GCC unroll 8
                for (int j = 0; j < P; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], pair, panel[j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P; ++j) _mm512_storeu_ps(g.c + i * g.ldc + 16 * j, acc[i][j]);
        }
    }
};

}  // namespace kt::KT_ISA
