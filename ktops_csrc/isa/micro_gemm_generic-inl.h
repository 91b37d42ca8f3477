#pragma once

// The micro-kernel contract, and a version for float32 and float64 on any ISA.
//
//   C[i][j] (+)= sum over s of A[i][s] . B[s][j]     i < m <= kRows, j < 16 * panels, panels <= panels(m)
//
//   a[i] + s * a_step       the kPack elements of row i at k-step s
//   b + p * b_stride        panel p
//   c + i * ldc             row i of C, 16 * panels columns, accumulators

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/panel-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

template <class C>
struct MicroArguments {
    int m, panels;
    const C* const* a;
    int64_t a_step;
    const C* b;
    int64_t b_stride;
    int64_t k_steps;
    Acc<C>* c;
    int64_t ldc;
    bool accumulate;
};

// Calls kernel<M, P>, M <= kRows, P <= kPanels, from a table.
template <class Kernels, class C, int... Is>
inline void call_micro_kernel(const MicroArguments<C>& g, std::integer_sequence<int, Is...>) {
    using Function = void (*)(const MicroArguments<C>&);
    static constexpr Function table[] = {
        &Kernels::template kernel<Is / Kernels::kPanels + 1, Is % Kernels::kPanels + 1>...};
    table[(g.m - 1) * Kernels::kPanels + g.panels - 1](g);
}

// Calls f(a_step, a compile-time constant): for rows in place, or for columns of panels.
template <class C, class F>
inline void with_a_step(int64_t a_step, F f) {
    if (a_step == kPack<C>) {
        f(std::integral_constant<int64_t, kPack<C>>());
    } else {
        f(std::integral_constant<int64_t, kPack<C> * kPanelColumns>());
    }
}

// Elements from one staged row of k elements to the next: zeros up to a multiple of kKMultiple, and up to a cache line
// more, so that rows don't start a power of two apart.
template <class C>
constexpr int64_t staged_row_stride(int64_t k) {
    return round_up(round_up(k, kKMultiple<C>) + 1, 64 / static_cast<int64_t>(sizeof(C)));
}

// Copies m rows of k elements to rows of C, staged_row_stride(k) apart, padded with zeros to a multiple of kKMultiple.
// Sets a[i] to row i of out.
template <class C, class T>
inline void stage_rows(const T* const* rows, int64_t m, int64_t k, C* out, const C** a) {
    const int64_t padded = round_up(k, kKMultiple<C>), stride = staged_row_stride<C>(k);
    for (int64_t i = 0; i < m; ++i, out += stride) {
        a[i] = out;
        if constexpr (std::is_same_v<C, T>) {
            std::memcpy(out, rows[i], static_cast<size_t>(k) * sizeof(C));
        } else {
            for_each_vector<Acc<C>>(k, [&](int64_t j, int64_t n) { store_n(out + j, load_n(rows[i] + j, n), n); });
        }
        for (int64_t j = k; j < padded; ++j) out[j] = C{};
    }
}

// Points a[] at rows i .. i + m of A, which are columns of its panels.
template <class C>
inline void point_into_panels(const C* panels, int64_t stride, int64_t i, int64_t m, const C** a) {
    for (int64_t j = i; j < i + m; ++j) {
        a[j - i] = panels + j / kPanelColumns * stride + j % kPanelColumns * kPack<C>;
    }
}

template <class C>
struct MicroGemm {
    static constexpr int kRows = Isa::kGemmRows;
    static constexpr int kPanels = Isa::kGemmPanels;
    static constexpr int64_t panels(int64_t) { return kPanels; }  // for m rows
    static constexpr bool kStaged = false;                        // reads rows of A anywhere in memory
    static constexpr bool kReadsRows = false;                     // reads B from panels only
    static constexpr bool kPacksAhead = false;                    // and packs none itself
    static constexpr int kUnroll = 4;                             // k-steps per iteration

    static void gemm(const MicroArguments<C>& g) {
        call_micro_kernel<MicroGemm>(g, std::make_integer_sequence<int, kRows * kPanels>());
    }

    template <int M, int P>
    static void kernel(const MicroArguments<C>& g) {
        using A = Acc<C>;
        constexpr int V = kPanelColumns / kLanes<A>;  // vectors per panel
        Vec<A> acc[M][P * V];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < P * V; ++j) acc[i][j] = g.accumulate ? load(g.c + i * g.ldc + j * kLanes<A>) : Vec<A>{};
        }
        const C* a[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) a[i] = g.a[i];
        const C* b = g.b;
        const int64_t b_stride = g.b_stride;
        const auto step = [&](int64_t at, int64_t offset) __attribute__((always_inline)) {
            Vec<A> panel[P * V];
#pragma GCC unroll 16
            for (int j = 0; j < P * V; ++j) {
                panel[j] = load(b + offset * kPanelColumns + (j / V) * b_stride + (j % V) * kLanes<A>);
            }
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const Vec<A> x = broadcast(read(a[i] + at));
#pragma GCC unroll 16
                for (int j = 0; j < P * V; ++j) acc[i][j] += x * panel[j];
            }
        };
        with_a_step<C>(g.a_step, [&](auto a_step) __attribute__((always_inline)) {
            int64_t s = 0;
            for (; s + kUnroll <= g.k_steps; s += kUnroll, b += kUnroll * kPanelColumns) {
#pragma GCC unroll 16
                for (int u = 0; u < kUnroll; ++u) step((s + u) * a_step(), u);
            }
            for (; s < g.k_steps; ++s, b += kPanelColumns) step(s * a_step(), 0);
        });
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < P * V; ++j) store(g.c + i * g.ldc + j * kLanes<A>, acc[i][j]);
        }
    }
};

// Defined in micro_gemm_<isa>-inl.h for ISAs with bfloat16 products; the others widen bfloat16.
template <>
struct MicroGemm<bfloat16>;

}  // namespace kt::KT_ISA
