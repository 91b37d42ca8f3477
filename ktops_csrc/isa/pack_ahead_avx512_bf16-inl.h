#pragma once

// Products with panels of bfloat16 while the next ones are packed.
//
//   registers  6 rows x 64 columns = 24 accumulators, 4 for a step of B, 1 for the broadcast of A

#include <immintrin.h>

#include "isa/direct_avx512_bf16-inl.h"
#include "isa/pack_ahead_avx512-inl.h"
#include "isa/products_avx512_bf16-inl.h"

namespace kt::KT_ISA {

struct AheadGemm {
    static constexpr int kRows = 6, kGroups = 2;
    static constexpr int64_t kStep = 16, kRowsAhead = 32, kMostRows = 192;
    static constexpr bool kStaged = false;

    // Sums stay in registers for many rows of W. Rows of a weight in a format are decoded some more columns at a time.
    static constexpr int64_t kMostColumns = 2 * kPackedColumns, kSums = 0;
    static constexpr int64_t kBlockElements = kPackedColumns * kMostAheadRows;
    static AheadShape shape(int64_t, int64_t, bool decodes) {
        return ahead_shape(kMostColumns, decodes ? kMostColumns : kPackedColumns, kBlockElements, kStep);
    }

    // Calls f(first, count) for the rows of each multiply().
    template <class F>
    static void for_each_part(int64_t m, F f) {
        const int64_t parts = ceil_div(m, kRows);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t i = m * part / parts;
            f(i, m * (part + 1) / parts - i);
        }
    }

    // Steps of PackAhead in multiply().
    static int64_t steps(int64_t, int64_t k) { return k / kStep; }

    static void finish(PackAhead& p) { pack_rest(p); }

    // Where the sums of rows from i on and of a group start: rows of C.
    static int64_t sums_at(int64_t i, int64_t group, int64_t, int64_t columns) {
        return i * columns + group * kAheadColumns;
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

    template <int M, int G>
    static void kernel(const bfloat16* const* rows, const bfloat16* b, int64_t b_stride, int64_t k, float* c,
                       int64_t ldc, bool accumulate, PackAhead& packing) {
        PackState at = packing.at;
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
        for (int64_t s = 0; s < k; s += kStep) {
#pragma GCC unroll 1
            for (int64_t t = s; t < s + kStep; t += 2, b += 64) {
                __m512bh panel[2 * G];
#pragma GCC unroll 4
                for (int j = 0; j < 2 * G; ++j) panel[j] = load_bf16(b + j / 2 * b_stride + j % 2 * 32);
                add_pairs(acc, panel, [&](int i) __attribute__((always_inline)) { return a[i] + t; });
            }
            at.pace.step([&]() __attribute__((always_inline)) { pack_piece(packing, at); });
        }
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) {
                Step::store_sums(c + i * ldc + kAheadColumns * g, kAheadColumns, acc[i] + 2 * g);
            }
        }
        packing.at = at;
    }
};

}  // namespace kt::KT_ISA
