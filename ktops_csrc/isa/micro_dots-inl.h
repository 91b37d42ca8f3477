#pragma once

// The micro-kernel of integer products: rows of signed codes of activations times panels of unsigned codes of weights.
//
//   panel       [k / 4][16][4]: one zmm register holds four codes of each of 16 columns
//   segments    parts of k with one scale for each column: their exact sums are scaled and added up in float32
//   registers   6 rows x 4 panels = 24 sums, 4 for a step of the panels, 1 for the broadcast of a row

#include "isa/dot4-inl.h"
#include "isa/micro_gemm_generic-inl.h"

namespace kt::KT_ISA {

// Steps of four codes of one group. For 16 columns of every panel: the scale, and what is taken off times the row's sum
// of the group; null where `zero` times that sum is taken off the integers instead, or where a segment before did it.
struct CodeSegment {
    int64_t steps, group;
    const float *scale, *min;
    int32_t zero;
};

struct CodeArguments {
    int m, panels;
    const int8_t* const* a;    // rows, from the first code of the first segment on
    const float* const* sums;  // of every row: of its groups
    const uint8_t* b;
    int64_t b_stride;
    const CodeSegment* segments;
    int64_t num_segments;
    float* c;
    int64_t ldc;
    bool accumulate;
};

struct MicroDots {
#ifdef KT_INT8_DOT
    static constexpr int kRows = 6, kPanels = 4;
#else
    static constexpr int kRows = 2, kPanels = 1;
#endif

    static void multiply(const CodeArguments& g) { call(g, std::make_integer_sequence<int, kRows * kPanels>()); }

private:
    static constexpr int V = 64 / static_cast<int>(kCodeBytes);  // vectors of a step of a panel

    template <int... Is>
    static void call(const CodeArguments& g, std::integer_sequence<int, Is...>) {
        using Function = void (*)(const CodeArguments&);
        static constexpr Function table[] = {&kernel<Is / kPanels + 1, Is % kPanels + 1>...};
        table[(g.m - 1) * kPanels + g.panels - 1](g);
    }

    template <int M, int P>
    static void kernel(const CodeArguments& g) {
        if constexpr (P == 4 && V == 1) {
            if (g.num_segments > 2) {  // sums of floats fit in registers beside those of integers
                CodeArguments half = g;
                half.panels = 2;
                segments<M, 2, true>(half);
                half.b += 2 * g.b_stride;
                half.c += 2 * kPanelColumns;
                return segments<M, 2, true>(half, 2 * kPanelColumns);
            }
        }
        segments<M, P, false>(g);
    }

    // columns: by which the segments' scales are ahead of these panels.
    template <int M, int P, bool kKeep>
    static void segments(const CodeArguments& g, int64_t columns = 0) {
        const uint8_t* b = g.b;
        VecDotsF kept[kKeep ? M : 1][kKeep ? P * V : 1];
        if constexpr (kKeep) {
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j) {
                    kept[i][j] = g.accumulate ? load_bits<VecDotsF>(g.c + i * g.ldc + j * kDotLanes) : VecDotsF{};
                }
            }
        }
        int64_t k = 0;
        for (int64_t s = 0; s < g.num_segments; ++s) {
            const CodeSegment& segment = g.segments[s];
            VecDots sums[M][P * V];
            const int8_t* a[M];
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                a[i] = g.a[i] + k;
                const auto zero = segment.zero * static_cast<int32_t>(g.sums[i][segment.group]);
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j) sums[i][j] = VecDots{} - zero;
            }
            for (int64_t step = 0; step < segment.steps; ++step, b += 64) {
                VecCodes panel[P * V];
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j) {
                    panel[j] = load_bits<VecCodes>(b + j / V * g.b_stride + j % V * kCodeBytes);
                }
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) {
                    const VecCodes x = (VecCodes)(VecDots{} + read(reinterpret_cast<const int32_t*>(a[i] + 4 * step)));
#pragma GCC unroll 8
                    for (int j = 0; j < P * V; ++j) sums[i][j] = dot4(sums[i][j], panel[j], x);
                }
            }
            k += 4 * segment.steps;
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) {
                const auto scale = load_bits<VecDotsF>(segment.scale + columns + j * kDotLanes);
                const auto min = segment.min ? load_bits<VecDotsF>(segment.min + columns + j * kDotLanes) : VecDotsF{};
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) {
                    VecDotsF sum = dots_to_floats(sums[i][j]) * scale;
                    if (segment.min) sum -= min * g.sums[i][segment.group];
                    if constexpr (kKeep) {
                        kept[i][j] += sum;
                    } else {
                        float* c = g.c + i * g.ldc + j * kDotLanes;
                        if (g.accumulate || s > 0) sum += load_bits<VecDotsF>(c);
                        std::memcpy(c, &sum, sizeof(sum));
                    }
                }
            }
        }
        if constexpr (kKeep) {
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j)
                    std::memcpy(g.c + i * g.ldc + j * kDotLanes, &kept[i][j], sizeof(VecDotsF));
            }
        }
    }
};

}  // namespace kt::KT_ISA
