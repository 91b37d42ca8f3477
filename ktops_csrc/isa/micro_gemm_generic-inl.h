#pragma once

// The micro-kernel contract, and a version for any ISA.
//
//   C[i][j] (+)= sum over s of A[i][s] . B[s][j]     i < m <= kRows, j < 16 * panels, panels <= kPanels
//
// A k-step s is kPack consecutive elements of k: a pair for bfloat16, one element otherwise.
//   a[i] + s * a_step           the kPack elements of row i at step s
//   b + p * b_stride            panel p: [k_steps][16][kPack]
//   c + i * ldc                 row i of C, 16 * panels columns, in Acc<T>

#include <cstdint>
#include <utility>

#include "isa/vec-inl.h"

namespace kt::KT_ISA {

constexpr int kPanelColumns = 16;

template <class T>
constexpr int kPack = 1;
template <>
constexpr int kPack<bfloat16> = 2;

template <class T>
struct MicroArguments {
    int m, panels;
    const T* const* a;
    int64_t a_step;
    const T* b;
    int64_t b_stride;
    int64_t k_steps;
    Acc<T>* c;
    int64_t ldc;
    bool accumulate;
};

// Table of kernel<M, P> for M <= kRows, P <= kPanels.
template <class Kernels, class T, int... Is>
inline void call_micro_kernel(const MicroArguments<T>& g, std::integer_sequence<int, Is...>) {
    using Function = void (*)(const MicroArguments<T>&);
    static constexpr Function table[] = {
        &Kernels::template kernel<Is / Kernels::kPanels + 1, Is % Kernels::kPanels + 1>...};
    table[(g.m - 1) * Kernels::kPanels + g.panels - 1](g);
}

template <class T>
struct MicroGemm {
    static constexpr int kRows = KT_GENERIC_ROWS;
    static constexpr int kPanels = KT_GENERIC_PANELS;
    static constexpr int64_t kDirectRows = 0;  // no kernel that reads B where it lies

    static void gemm(const MicroArguments<T>& g) {
        call_micro_kernel<MicroGemm>(g, std::make_integer_sequence<int, kRows * kPanels>());
    }

    template <int M, int P>
    static void kernel(const MicroArguments<T>& g) {
        using A = Acc<T>;
        constexpr int V = kPanelColumns / kLanes<A>;  // vectors a panel
        Vec<A> acc[M][P * V];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) acc[i][j] = g.accumulate ? load(g.c + i * g.ldc + j * kLanes<A>) : Vec<A>{};
        }
        const T* a[M];
        for (int i = 0; i < M; ++i) a[i] = g.a[i];
        for (int64_t s = 0; s < g.k_steps; ++s) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) {
                const T* b = g.b + (j / V) * g.b_stride + (s * kPanelColumns + (j % V) * kLanes<A>)*kPack<T>;
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) multiply_add(acc[i][j], a[i] + s * g.a_step, b);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < P * V; ++j) store(g.c + i * g.ldc + j * kLanes<A>, acc[i][j]);
        }
    }

private:
    template <class A>
    static void multiply_add(Vec<A>& acc, const A* a, const A* b) {
        acc += broadcast(read(a)) * load(b);
    }
    static void multiply_add(Vec<float>& acc, const bfloat16* a, const bfloat16* b) {
        const VecU32 pairs = load_bits<VecU32>(b);
        acc += broadcast(to_float(read(a))) * bit_cast<Vec<float>>(pairs << 16);
        acc += broadcast(to_float(read(a + 1))) * bit_cast<Vec<float>>(pairs & 0xffff0000u);
    }
};

}  // namespace kt::KT_ISA
