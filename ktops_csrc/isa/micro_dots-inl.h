#pragma once

// The micro-kernel of integer products: rows of signed codes of activations times panels of unsigned codes of weights.
//
//   panel       [k / 4][16][4]: one zmm register holds four codes of each of 16 columns
//   segments    parts of k with one scale for each column: exact sums of groups are scaled and added up in float32
//   registers   6 rows x 4 panels = 24 sums, 4 for a step of the panels, 1 for the broadcast of a row

#include "isa/dot4-inl.h"
#include "isa/micro_gemm_generic-inl.h"

namespace kt::KT_ISA {

// A run of steps, of four codes each, that belong to one group: the last one of a group `ends` it. For the columns of
// C: the scales, and what is taken off times the row's sum of the group; null where the sums begin with that, or where
// a run before has taken it.
struct CodeSegment {
    int64_t first, steps, group;
    const float *scale, *min;
    bool begins;      // with the row's start of the group, else with 0
    bool ends, adds;  // adds: to what C holds
    bool last;        // C is whole then, and multiplied by the rows' scales
};

struct CodeArguments {
    int m, panels;
    const int8_t* const* a;        // rows, from the first code of the panels on
    const float* const* sums;      // of every row: of its groups
    const int32_t* const* starts;  // of every row and group: what its sums begin with
    const float* row_scale;        // of every row
    const uint8_t* b;
    int64_t b_stride;
    const CodeSegment* segments;
    int64_t num_segments;
    float* c;
    int64_t ldc;
    const uint8_t* ahead;  // what is read into the cache meanwhile, every kCodesALine codes of a row
    int64_t ahead_step;
};

// Bytes from one panel of codes, or row of them, to the next: not a power of two, or their lines would share a few sets
// of the cache.
constexpr int64_t code_panel_stride(int64_t k) { return k * kPanelColumns + 64; }
constexpr int64_t code_row_stride(int64_t k) { return k + 64; }

struct MicroDots {
#ifdef KT_INT8_DOT
    static constexpr int kRows = 6, kPanels = 4;
#else
    static constexpr int kRows = 2, kPanels = 1;
#endif
    static constexpr int64_t kCodesALine = 16;  // of a row, while which a line is read ahead

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
        constexpr int64_t kUnroll = kCodesALine / 4;  // steps; every run is a multiple
        const uint8_t* ahead = g.ahead;
        VecDots sums[M][P * V];
        bool starts = true;
        for (int64_t s = 0; s < g.num_segments; ++s) {
            const CodeSegment& segment = g.segments[s];
            const int8_t* a[M];
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) a[i] = g.a[i] + 4 * segment.first;
            if (starts) start<M, P>(g, segment, sums);
            const uint8_t* b = g.b + 64 * segment.first;
            for (int64_t step = 0; step < segment.steps; step += kUnroll) {
                __builtin_prefetch(ahead, 0, 2);
                ahead += g.ahead_step;
#pragma GCC unroll 4
                for (int u = 0; u < kUnroll; ++u, b += 64) {
                    VecCodes panel[P * V];
#pragma GCC unroll 8
                    for (int j = 0; j < P * V; ++j) {
                        panel[j] = load_bits<VecCodes>(b + j / V * g.b_stride + j % V * kCodeBytes);
                    }
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) {
                        const auto x =
                            (VecCodes)(VecDots{} + read(reinterpret_cast<const int32_t*>(a[i] + 4 * (step + u))));
#pragma GCC unroll 8
                        for (int j = 0; j < P * V; ++j) sums[i][j] = dot4(sums[i][j], panel[j], x);
                    }
                }
            }
            starts = segment.ends;
            if (segment.ends) finish<M, P>(g, segment, sums);
        }
    }

    template <int M, int P>
    __attribute__((always_inline)) static void start(const CodeArguments& g, const CodeSegment& segment,
                                                     VecDots (&sums)[M][P * V]) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const int32_t first = segment.begins ? g.starts[i][segment.group] : 0;
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) sums[i][j] = VecDots{} + first;
        }
    }

    template <int M, int P>
    __attribute__((always_inline)) static void finish(const CodeArguments& g, const CodeSegment& segment,
                                                      const VecDots (&sums)[M][P * V]) {
        const auto put = [&](auto min, auto adds, auto last) __attribute__((always_inline)) {
            put_sums<M, P, min(), adds(), last()>(g, segment, sums);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        const auto with_min = [&](auto min) __attribute__((always_inline)) {
            if (!segment.adds) return segment.last ? put(min, No(), Yes()) : put(min, No(), No());
            segment.last ? put(min, Yes(), Yes()) : put(min, Yes(), No());
        };
        segment.min ? with_min(Yes()) : with_min(No());
    }

    // c (+)= scale * sums - min * the row's sum, at last times the row's scale
    template <int M, int P, bool kMin, bool kAdds, bool kLast>
    __attribute__((always_inline)) static void put_sums(const CodeArguments& g, const CodeSegment& segment,
                                                        const VecDots (&sums)[M][P * V]) {
        const float *scales = segment.scale, *mins = segment.min;
        const int64_t group = segment.group, ldc = g.ldc;
#pragma GCC unroll 8
        for (int j = 0; j < P * V; ++j) {
            const auto scale = load_bits<VecDotsF>(scales + j * kDotLanes);
            const auto min = kMin ? load_bits<VecDotsF>(mins + j * kDotLanes) : VecDotsF{};
            float* c = g.c + j * kDotLanes;
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i, c += ldc) {
                VecDotsF sum = dots_to_floats(sums[i][j]) * scale;
                if constexpr (kMin) sum -= min * g.sums[i][group];
                if constexpr (kAdds) sum += load_bits<VecDotsF>(c);
                if constexpr (kLast) sum *= g.row_scale[i];
                std::memcpy(c, &sum, sizeof(sum));
            }
        }
    }
};

}  // namespace kt::KT_ISA
