#pragma once

// bfloat16 with VDPBF16PS: zmm accumulators, one broadcast pair of A against one row of a panel.
//
//   registers  6 rows x 4 panels = 24 accumulators, 4 for a step of B, 1 for the broadcast of A

#include <immintrin.h>

#include "isa/micro_gemm_generic-inl.h"

namespace kt::KT_ISA {

inline __m512bh load_bf16(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

template <>
struct MicroGemm<bfloat16> {
    static constexpr int kRows = 6;
    static constexpr int kPanels = 4;
    static constexpr int64_t kDirectRows = 8;
    static constexpr bool kStaged = false;

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

    // C[i][j] = a[i] . row j of W, for i < m <= kDirectRows and j < n: W is read once, where it lies, with no panel.
    static void direct(const bfloat16* const* a, int64_t m, const bfloat16* w, int64_t stride, int64_t n, int64_t k,
                       float* c, int64_t ldc) {
        for (int64_t i = 0; i < m; i += 4) {
            for (int64_t j = 0; j < n; j += 4) {
                const bool whole = n - j >= 4;
                switch (m - i < 4 ? m - i : 4) {
                    case 1:
                        whole ? dots<1, 4>(a + i, w + j * stride, stride, k, c + i * ldc + j, ldc)
                              : dots_edge<1>(a + i, w + j * stride, stride, n - j, k, c + i * ldc + j, ldc);
                        break;
                    case 2:
                        whole ? dots<2, 4>(a + i, w + j * stride, stride, k, c + i * ldc + j, ldc)
                              : dots_edge<2>(a + i, w + j * stride, stride, n - j, k, c + i * ldc + j, ldc);
                        break;
                    case 3:
                        whole ? dots<3, 4>(a + i, w + j * stride, stride, k, c + i * ldc + j, ldc)
                              : dots_edge<3>(a + i, w + j * stride, stride, n - j, k, c + i * ldc + j, ldc);
                        break;
                    default:
                        whole ? dots<4, 4>(a + i, w + j * stride, stride, k, c + i * ldc + j, ldc)
                              : dots_edge<4>(a + i, w + j * stride, stride, n - j, k, c + i * ldc + j, ldc);
                }
            }
        }
    }

private:
    template <int M, int N>
    static void dots(const bfloat16* const* a, const bfloat16* w, int64_t stride, int64_t k, float* c, int64_t ldc) {
        __m512 acc[M][N];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) acc[i][j] = _mm512_setzero_ps();
        }
        auto step = [&](int64_t s, __mmask32 mask) __attribute__((always_inline)) {
            __m512bh x[M];
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) x[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[i] + s);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) {
                const __m512bh y = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + j * stride + s);
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x[i], y);
            }
        };
        int64_t s = 0;
        for (; s + 32 <= k; s += 32) {
            // The next rows of W: far enough ahead to hide memory, near enough to stay in L1.
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) _mm_prefetch(w + j * stride + s + kPrefetch, _MM_HINT_T0);
            step(s, 0xffffffffu);
        }
        if (s < k) step(s, (1u << (k - s)) - 1);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) c[i * ldc + j] = _mm512_reduce_add_ps(acc[i][j]);
        }
    }

    template <int M>
    static void dots_edge(const bfloat16* const* a, const bfloat16* w, int64_t stride, int64_t n, int64_t k, float* c,
                          int64_t ldc) {
        for (int64_t j = 0; j < n; ++j) dots<M, 1>(a, w + j * stride, stride, k, c + j, ldc);
    }

    static constexpr int64_t kPrefetch = 512;  // elements: 1 KiB
};

}  // namespace kt::KT_ISA
