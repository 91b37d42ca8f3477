#pragma once

// Products with panels of bfloat16 while the next ones are packed.
//
//   registers  6 rows x 64 columns = 24 accumulators, 4 for a step of B, 1 for the broadcast of A

#include <immintrin.h>

#include "isa/direct_avx512_bf16-inl.h"
#include "isa/pack_ahead-inl.h"
#include "isa/products_avx512_bf16-inl.h"

namespace kt::KT_ISA {

struct AheadGemm {
    static constexpr int kRows = 6, kGroups = 2;

    // Packs what is left.
    static void finish(PackAhead& p) {
        p.pace.finish([&] { pack(p); });
    }

    // C[i][0 .. 32 * groups) (+)= row i of A . the panels of `groups` groups, b_stride apart, i < m <= kRows.
    static void multiply(int m, int groups, const bfloat16* const* a, const bfloat16* b, int64_t b_stride, int64_t k,
                         float* c, int64_t ldc, bool accumulate, PackAhead& packing) {
        using Function =
            void (*)(const bfloat16* const*, const bfloat16*, int64_t, int64_t, float*, int64_t, bool, PackAhead&);
        static constexpr Function table[] = {kernel<1, 1>, kernel<1, 2>, kernel<2, 1>, kernel<2, 2>,
                                             kernel<3, 1>, kernel<3, 2>, kernel<4, 1>, kernel<4, 2>,
                                             kernel<5, 1>, kernel<5, 2>, kernel<6, 1>, kernel<6, 2>};
        table[(m - 1) * kGroups + groups - 1](a, b, b_stride, k, c, ldc, accumulate, packing);
    }

private:
    using Step = ColumnStep<bfloat16>;

    // Packs a pair of rows.
    __attribute__((always_inline)) static void pack(PackAhead& p) {
        if (p.groups == kAheadGroups) {
            pack_groups<kAheadGroups>(p, 0);
        } else {
            for (int64_t g = 0; g < p.groups; ++g) pack_groups<1>(p, g);
        }
        p.from += 2 * p.stride;
        p.to += 128;
        if (!p.ahead) return;
        p.ahead += 2 * p.stride;
        if ((p.ahead_left -= 2) <= 0) p.next_slab();
    }

    template <int N>
    __attribute__((always_inline)) static void pack_groups(const PackAhead& p, int64_t group) {
        const char* w = p.from + group * 64;
        char* to = p.to + group * p.group_bytes;
        __m512i even[N], odd[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            even[i] = _mm512_loadu_si512(w + 64 * i);
            odd[i] = _mm512_loadu_si512(w + p.stride + 64 * i);
        }
        if (p.ahead) {
            const char* ahead = p.ahead + group * 64;
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
                __builtin_prefetch(ahead + 64 * i, 0, 2);
                __builtin_prefetch(ahead + p.stride + 64 * i, 0, 2);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i, to += p.group_bytes) {
            _mm512_store_si512(to, _mm512_unpacklo_epi16(even[i], odd[i]));
            _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(even[i], odd[i]));
        }
    }

    template <int M, int G>
    static void kernel(const bfloat16* const* rows, const bfloat16* b, int64_t b_stride, int64_t k, float* c,
                       int64_t ldc, bool accumulate, PackAhead& packing) {
        PackAhead p = packing;
        __m512 acc[M][2 * G];
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) {
                acc[i][2 * g] = acc[i][2 * g + 1] = _mm512_setzero_ps();
                if (accumulate) Step::load_sums(c + i * ldc + kAheadColumns * g, kAheadColumns, acc[i] + 2 * g);
            }
        }
        const bfloat16* a[M];
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) a[i] = rows[i];
        for (int64_t s = 0; s < k; s += kAheadK) {
#pragma GCC unroll 1
            for (int64_t t = s; t < s + kAheadK; t += 2, b += 64) {
                __m512bh panel[2 * G];
#pragma GCC unroll 4
                for (int j = 0; j < 2 * G; ++j) panel[j] = load_bf16(b + j / 2 * b_stride + j % 2 * 32);
                add_pairs(acc, panel, [&](int i) __attribute__((always_inline)) { return a[i] + t; });
            }
            p.pace.step([&]() __attribute__((always_inline)) { pack(p); });
        }
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) {
                Step::store_sums(c + i * ldc + kAheadColumns * g, kAheadColumns, acc[i] + 2 * g);
            }
        }
        packing = p;
    }
};

}  // namespace kt::KT_ISA
