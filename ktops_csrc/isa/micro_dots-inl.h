#pragma once

// The micro-kernel of integer products: rows of signed codes of activations times panels of unsigned codes of weights.
//
//   panel       [k / 4][16][4]: one zmm register holds four codes of each of 16 columns
//   blocks      32 columns of k: their exact sums are scaled by the scale of the row of activations and added up in
//               float32; and by the weights' scales, once for all blocks of a group, or for each group of a block
//   registers   3 rows x 4 panels: 12 exact sums and 12 of floats, 4 for a step of the panels, 1 for the broadcast of a
//               row. What a block has summed is scaled between the first products of the next one.

#include "isa/dot4-inl.h"
#include "isa/micro_gemm_generic-inl.h"

namespace kt::KT_ISA {

struct CodeArguments {
    int m, panels;
    // Every row, from the first code of the panels on; and so many bytes from there: the scales of blocks (float), what
    // the exact sums of parts (a block, or a group of half a block) begin with (int32), the sums of groups (float).
    const int8_t* const* a;
    int64_t a_scales, starts, sums;
    const uint8_t* b;
    int64_t b_stride;
    bool pairs;  // of every 128 columns the even ones come first, then the odd ones
    int64_t blocks;
    // Groups, the first of which ends after first_blocks: for the columns of C, w_stride from group to group, scales
    // and what is taken off times the row's sum of the group; no mins where the sums begin with that. A group that
    // begins before the panels has been taken care of.
    int64_t group, first_blocks;
    const float *scales, *mins;
    int64_t w_stride;
    bool begins;
    bool adds;  // to what C holds
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
    static constexpr int kRows = 3, kPanels = 4;
#else
    static constexpr int kRows = 2, kPanels = 1;
#endif
    static constexpr int64_t kCodesALine = 32;  // of a row, while which a line is read ahead

    static void multiply(CodeArguments g) {
        if (g.group < kBlock) return tiles<Groups::kHalves>(g, kTiles);
        g.group == kBlock ? tiles<Groups::kBlocks>(g, kTiles) : tiles<Groups::kLong>(g, kTiles);
    }

private:
    static constexpr int64_t kBlock = 32, kUnitBlocks = 4;
    static constexpr int V = 64 / static_cast<int>(kCodeBytes);  // vectors of a step of a panel
    static constexpr auto kTiles = std::make_integer_sequence<int, kRows>();

    enum class Groups { kHalves, kBlocks, kLong };

    template <Groups kGroups, int... Is>
    static void tiles(CodeArguments& g, std::integer_sequence<int, Is...>) {
        using Function = void (*)(CodeArguments&);
        static constexpr Function table[] = {&rows<Is + 1, kGroups>...};
        table[g.m - 1](g);
    }

    template <int M, Groups kGroups>
    static void rows(CodeArguments& g) {
        take_panels<M, kPanels, kGroups>(g);
        if constexpr (kPanels > 2) take_panels<M, 2, kGroups>(g);
        if constexpr (kPanels > 1) take_panels<M, 1, kGroups>(g);
    }

    template <int M, int P, Groups kGroups>
    static void take_panels(CodeArguments& g) {
        while (g.panels >= P) {
            kernel<M, P, kGroups>(g);
            g.panels -= P;
            g.b += P * g.b_stride;
            g.c += P * kPanelColumns;
            g.scales += P * kPanelColumns;
            if (g.mins) g.mins += P * kPanelColumns;
            g.ahead += g.ahead_step * g.blocks;
        }
    }

    template <class T>
    static T number(const int8_t* from, int64_t i) {
        return read(reinterpret_cast<const T*>(from + i * static_cast<int64_t>(sizeof(T))));
    }

    template <int M, int P, Groups kGroups>
    static void kernel(const CodeArguments& g) {
        VecDots sums[M][P * V];
        VecDotsF totals[M][P * V] = {};
        const uint8_t* ahead = g.ahead;
        if constexpr (kGroups == Groups::kLong) {
            int64_t group = 0, end = smaller(g.first_blocks, g.blocks);
            for (int64_t block = 0; block < g.blocks; ++group) {
                add_part<M, P, kGroups, false>(g, block, ahead, sums, totals);
                while (++block < end) add_part<M, P, kGroups, true>(g, block, ahead, sums, totals);
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) finish<P, kGroups>(g, i, block - 1, sums[i], totals[i]);
                put_group<M, P>(g, group, totals);
                end = smaller(end + g.group / kBlock, g.blocks);
            }
        } else {
            const int64_t parts = kGroups == Groups::kHalves ? 2 * g.blocks : g.blocks;
            add_part<M, P, kGroups, false>(g, 0, ahead, sums, totals);
            for (int64_t part = 1; part < parts; ++part) {
                add_part<M, P, kGroups, true>(g, part, ahead, sums, totals);
                if (g.mins) take_mins<M, P>(g, part - 1, totals);
            }
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) finish<P, kGroups>(g, i, parts - 1, sums[i], totals[i]);
            if (g.mins) take_mins<M, P>(g, parts - 1, totals);
            put<M, P>(g, g.adds, totals);
        }
    }

    // The exact sums of a part, from its start on; before, those of the part before it are added to totals, if kFinish.
    template <int M, int P, Groups kGroups, bool kFinish>
    __attribute__((always_inline)) static void add_part(const CodeArguments& g, int64_t part, const uint8_t*& ahead,
                                                        VecDots (&sums)[M][P * V], VecDotsF (&totals)[M][P * V]) {
        constexpr int kHalves = kGroups == Groups::kHalves ? 1 : 2, kSteps = kBlock / 2 / 4;
        const int64_t unit = part / kUnitBlocks * kUnitBlocks, apart = (g.pairs ? kUnitBlocks : 1) * kBlock / 2;
        int64_t at = g.pairs ? unit * kBlock + (part - unit) * kBlock / 2 : part * kHalves * kBlock / 2;
        if (kHalves == 2 || part % 2 == 0) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += g.ahead_step;
        }
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half, at += apart) {
            const uint8_t* b = g.b + kPanelColumns * at;
#pragma GCC unroll 4
            for (int u = 0; u < kSteps; ++u, b += 64) {
                VecCodes panel[P * V];
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j) {
                    panel[j] = load_bits<VecCodes>(b + j / V * g.b_stride + j % V * kCodeBytes);
                }
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) {
                    if (half == 0 && u == 0) {
                        if constexpr (kFinish) finish<P, kGroups>(g, i, part - 1, sums[i], totals[i]);
                        const VecDots start = number<int32_t>(g.a[i] + g.starts, part) - VecDots{};
#pragma GCC unroll 8
                        for (int j = 0; j < P * V; ++j) sums[i][j] = start;
                    }
                    const auto x = (VecCodes)(read(reinterpret_cast<const int32_t*>(g.a[i] + at + 4 * u)) - VecDots{});
#pragma GCC unroll 8
                    for (int j = 0; j < P * V; ++j) sums[i][j] = dot4(sums[i][j], panel[j], x);
                }
            }
        }
    }

    // totals of row i += sums of a part * the row's scale (* the scales of the part's group)
    template <int P, Groups kGroups>
    __attribute__((always_inline)) static void finish(const CodeArguments& g, int64_t i, int64_t part,
                                                      const VecDots (&sums)[P * V], VecDotsF (&totals)[P * V]) {
        const int64_t block = kGroups == Groups::kHalves ? part / 2 : part;
        const VecDotsF scale = number<float>(g.a[i] + g.a_scales, block) - VecDotsF{};
#pragma GCC unroll 8
        for (int j = 0; j < P * V; ++j) {
            VecDotsF sum = dots_to_floats(sums[j]);
            if constexpr (kGroups != Groups::kLong) {
                sum *= load_bits<VecDotsF>(g.scales + part * g.w_stride + j * kDotLanes);
            }
            totals[j] += sum * scale;
        }
    }

    // totals -= mins * the rows' sums of a group
    template <int M, int P>
    __attribute__((always_inline)) static void take_mins(const CodeArguments& g, int64_t group,
                                                         VecDotsF (&totals)[M][P * V]) {
        const float* mins = g.mins + group * g.w_stride;
#pragma GCC unroll 8
        for (int j = 0; j < P * V; ++j) {
            const auto min = load_bits<VecDotsF>(mins + j * kDotLanes);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) totals[i][j] -= min * number<float>(g.a[i] + g.sums, group);
        }
    }

    // C (+)= totals * scales - mins * the rows' sums of a group; then totals are zeros.
    template <int M, int P>
    __attribute__((always_inline)) static void put_group(const CodeArguments& g, int64_t group,
                                                         VecDotsF (&totals)[M][P * V]) {
        const float* scales = g.scales + group * g.w_stride;
#pragma GCC unroll 8
        for (int j = 0; j < P * V; ++j) {
            const auto scale = load_bits<VecDotsF>(scales + j * kDotLanes);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) totals[i][j] *= scale;
        }
        if (g.mins && (group || g.begins)) take_mins<M, P>(g, group, totals);
        put<M, P>(g, g.adds || group, totals);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) totals[i][j] = VecDotsF{};
        }
    }

    // C (+)= totals
    template <int M, int P>
    __attribute__((always_inline)) static void put(const CodeArguments& g, bool adds,
                                                   const VecDotsF (&totals)[M][P * V]) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) {
                float* c = g.c + i * g.ldc + j * kDotLanes;
                const VecDotsF sum = adds ? totals[i][j] + load_bits<VecDotsF>(c) : totals[i][j];
                std::memcpy(c, &sum, sizeof(sum));
            }
        }
    }
};

}  // namespace kt::KT_ISA
