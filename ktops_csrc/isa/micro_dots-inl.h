#pragma once

// The micro-kernel of integer products: rows of signed codes of activations times panels of unsigned codes of weights.
//
//   panel       [k / 4][16][4]: one zmm register holds four codes of each of 16 columns
//   blocks      32 columns of k. Exact sums over a block are multiplied by its scale of activations and added up in
//               float32. The weights' scales are applied once per group of blocks, or once per group within a block
//   units       128 columns. If all blocks of a unit share one scale, in every row of a call, they are summed at once
//   registers   3 rows x 4 panels: 12 exact sums and 12 of floats, 4 for a step of the panels, 1 for the broadcast of a
//               row. The sums of a block are scaled between the first products of the next one. On an ISA without an
//               instruction for four products, products of small codes are first added up in words, in registers of
//               their own: 4 rows x 2 panels (avx512), or 2 rows x 1 panel of two registers (avx2)

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/dot4-inl.h"
#include "isa/panel-inl.h"
#include "isa/simd-inl.h"

namespace kt::KT_ISA {

struct CodeArguments {
    int m, panels;
    // Pointers to every row's first code in the panels' range. Offsets in bytes from there: the scales of blocks
    // (float); the initial values of the exact sums of parts (int32), a part being a block, or a group of half a block;
    // the sums of groups (float).
    const int8_t* const* a;
    int64_t a_scales, starts, sums;
    int64_t joined;  // another offset: for every unit, 1 if its blocks share one scale (int8)
    bool joins;      // true if any may
    const uint8_t* b;
    int64_t b_stride;
    int pairs_in_word;  // for these codes (dot4-inl.h)
    bool pairs;         // the even columns of every 128 come first, then the odd ones
    int64_t blocks;
    // Groups, the first of which ends after first_blocks blocks. For every group and column of C, w_stride from group
    // to group: scales, and mins, which are subtracted times the row's sum of the group; null if `starts` include them.
    // begins: the first group starts with the panels; else its mins have been subtracted already.
    int64_t group, first_blocks;
    const float *scales, *mins;
    int64_t w_stride;
    bool begins;
    bool adds;  // to C
    float* c;
    int64_t ldc;
    const uint8_t* ahead;  // where to prefetch meanwhile, a line per kCodesALine codes of a row
    int64_t ahead_step;
};

// Bytes from one panel or row of codes to the next: not a power of two, or their lines would share a few sets of the
// cache.
constexpr int64_t code_panel_stride(int64_t k) { return k * kPanelColumns + 64; }
constexpr int64_t code_row_stride(int64_t k) { return k + 64; }

struct MicroDots {
    static constexpr int kRows = Isa::kCodeGemmRows, kPanels = Isa::kCodeGemmPanels;
    static constexpr int64_t kCodesALine = 32;  // of a row, per prefetched line
    static constexpr int kLeastPairs = 2;       // pairs in a word that make it worth adding up products in words

    static void multiply(CodeArguments g) {
        with_word_steps(g.pairs_in_word, [&](auto steps) {
            if (g.group < kBlock) return call_rows<Groups::kHalves, steps()>(g, kRowCounts);
            g.group == kBlock ? call_rows<Groups::kBlocks, steps()>(g, kRowCounts)
                              : call_rows<Groups::kLong, steps()>(g, kRowCounts);
        });
    }

private:
    static constexpr int64_t kBlock = 32, kUnitBlocks = 4, kStepCodes = 16;  // codes of a row in a run of four steps
    static constexpr int V = 64 / static_cast<int>(kCodeBytes);              // vectors of a step of a panel
    static constexpr auto kRowCounts = std::make_integer_sequence<int, kRows>();

    // Calls f(constant): the steps whose products are added up in words before their sums are widened, or 0.
    template <class F>
    static void with_word_steps(int pairs_in_word, F f) {
        if constexpr (!Isa::kByteDot) {
            if (pairs_in_word >= 4) return f(std::integral_constant<int, 4>());
            if (pairs_in_word >= kLeastPairs) return f(std::integral_constant<int, kLeastPairs>());
        }
        f(std::integral_constant<int, 0>());
    }

    enum class Groups { kHalves, kBlocks, kLong };

    template <Groups kGroups, int kWordSteps, int... Is>
    static void call_rows(CodeArguments& g, std::integer_sequence<int, Is...>) {
        using Function = void (*)(CodeArguments&);
        static constexpr Function table[] = {&rows<Is + 1, kGroups, kWordSteps>...};
        table[g.m - 1](g);
    }

    template <int M, Groups kGroups, int kWordSteps>
    static void rows(CodeArguments& g) {
        take_panels<M, kPanels, kGroups, kWordSteps>(g);
        if constexpr (kPanels > 2) take_panels<M, 2, kGroups, kWordSteps>(g);
        if constexpr (kPanels > 1) take_panels<M, 1, kGroups, kWordSteps>(g);
    }

    template <int M, int P, Groups kGroups, int kWordSteps>
    static void take_panels(CodeArguments& g) {
        while (g.panels >= P) {
            kernel<M, P, kGroups, kWordSteps>(g);
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

    template <int M, int P, Groups kGroups, int kWordSteps>
    static void kernel(const CodeArguments& g) {
        constexpr bool kHalf = kGroups == Groups::kHalves;
        VecDots sums[M][P * V];
        VecDotsF totals[M][P * V] = {};
        const uint8_t* ahead = g.ahead;
        const int64_t parts = kHalf ? 2 * g.blocks : g.blocks;
        int64_t group = 0, end = kGroups == Groups::kLong ? smaller(g.first_blocks, parts) : parts;
        for (int64_t part = 0; part < parts; ++group) {
            int64_t last = part;  // the part whose sums are scaled next: zeros at first
            clear<M, P>(sums);
            while (part < end) {
                const bool unit = kGroups == Groups::kLong && joined<M>(g, part);
                int64_t at = first_code<kGroups>(g, part);
                if (!kHalf || part % 2 == 0) read_ahead(g, ahead);
                add_steps<M, P, kWordSteps>(g, at, sums, [&](int i) __attribute__((always_inline)) {
                    finish<P, kGroups>(g, i, last, sums[i], totals[i]);
                    int32_t start = number<int32_t>(g.a[i] + g.starts, part);
                    for (int64_t next = 1; unit && next < kUnitBlocks; ++next) {
                        start += number<int32_t>(g.a[i] + g.starts, part + next);
                    }
#pragma GCC unroll 8
                    for (int j = 0; j < P * V; ++j) sums[i][j] = start - VecDots{};
                });
                if constexpr (!kHalf) {
                    const int64_t apart = (g.pairs && !unit ? kUnitBlocks : 1) * kStepCodes;
                    for (int64_t runs = unit ? 2 * kUnitBlocks - 1 : 1; runs > 0; --runs) {
                        at += apart;
                        if (runs % 2 == 0) read_ahead(g, ahead);
                        add_steps<M, P, kWordSteps>(g, at, sums, [](int) {});
                    }
                }
                if (kGroups == Groups::kBlocks && g.mins) take_mins<M, P>(g, part, totals);
                last = part;
                part = unit ? smaller(part + kUnitBlocks, end) : part + 1;
            }
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) finish<P, kGroups>(g, i, last, sums[i], totals[i]);
            if constexpr (kGroups == Groups::kLong) {
                put_group<M, P>(g, group, totals);
                end = smaller(end + g.group / kBlock, parts);
            }
        }
        if constexpr (kGroups != Groups::kLong) put<M, P>(g, g.adds, totals);
    }

    // The index of a part's first code in a row; of its first even column if `pairs`.
    template <Groups kGroups>
    static int64_t first_code(const CodeArguments& g, int64_t part) {
        if (kGroups == Groups::kHalves) return part * kStepCodes;
        const int64_t in_unit = part % kUnitBlocks;
        return part * kBlock - (g.pairs ? in_unit * kStepCodes : 0);
    }

    template <int M, int P, class Vector>
    __attribute__((always_inline)) static void clear(Vector (&x)[M][P * V]) {
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) x[i][j] = Vector{};
        }
    }

    // True if a block is the first of a unit whose blocks share one scale in every row.
    template <int M>
    __attribute__((always_inline)) static bool joined(const CodeArguments& g, int64_t block) {
        if (!g.joins || block % kUnitBlocks) return false;
        int all = 1;
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) all &= number<int8_t>(g.a[i] + g.joined, block / kUnitBlocks);
        return all;
    }

    __attribute__((always_inline)) static void read_ahead(const CodeArguments& g, const uint8_t*& ahead) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += g.ahead_step;
    }

    // Four steps, from code `at` of a row on. Calls first(i) before the first products of row i. Products of kWordSteps
    // steps are added up in words; with 0, none are.
    template <int M, int P, int kWordSteps, class First>
    __attribute__((always_inline)) static void add_steps(const CodeArguments& g, int64_t at, VecDots (&sums)[M][P * V],
                                                         First first) {
        const uint8_t* b = g.b + kPanelColumns * at;
        VecWords words[M][P * V] = {};
#pragma GCC unroll 4
        for (int u = 0; u < kStepCodes / 4; ++u, b += 64) {
            VecCodes panel[P * V];
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) {
                panel[j] = load_bits<VecCodes>(b + j / V * g.b_stride + j % V * kCodeBytes);
            }
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                if (u == 0) first(i);
                const auto x = (VecCodes)(read(reinterpret_cast<const int32_t*>(g.a[i] + at + 4 * u)) - VecDots{});
#pragma GCC unroll 8
                for (int j = 0; j < P * V; ++j) {
                    if constexpr (kWordSteps == 0) {
                        sums[i][j] = dot4<kAnyCode>(sums[i][j], panel[j], x);
                    } else {
                        const VecWords product = multiply_bytes(panel[j], x);
                        words[i][j] = u % kWordSteps ? words[i][j] + product : product;
                        if (u % kWordSteps == kWordSteps - 1) sums[i][j] = add_words(sums[i][j], words[i][j]);
                    }
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

    // C (+)= totals * scales - mins * the rows' sums of a group; then zeroes totals.
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
        clear<M, P>(totals);
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
