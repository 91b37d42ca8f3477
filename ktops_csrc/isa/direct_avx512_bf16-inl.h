#pragma once

// Products for the few rows of an expert at decode: W is read once, where it lies, with no panel.

#include <immintrin.h>

#include "isa/panel-inl.h"

namespace kt::KT_ISA {

struct DirectGemm {
    static constexpr int64_t kDirectRows = 8;

    // C[i][j] = a[i] . row j of W, for i < m <= kDirectRows and j < n. Rows of W are `stride` apart.
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
