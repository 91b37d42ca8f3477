#pragma once

// Measures the multiply-add rate of one thread with operands from its L2 cache: what a layer's products can reach at
// most, since the peak of isa/peak-inl.h reads none.

#include <chrono>
#include <cstdint>

#include "core/bfloat16.h"
#include "core/workspace.h"
#include "isa/bands-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

// Rows of A times panels of B, multiplied by MicroGemm in the order of a layer: a band times x in panels on an ISA that
// reads rows of weights in place, else rows of x times weights in panels. With rows of 4 KiB and two panels at once, or
// of 2 KiB and four, neither operand fits in 48 KiB of L1; both fit in 512 KiB of L2.
template <class C>
class ProductsFromL2 {
    using Micro = MicroGemm<C>;
    static constexpr bool kBand = Micro::kReadsRows;
    static constexpr auto kBytes = static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kRows = kBand ? kBandRows : 64, kPanels = kBand ? 4 : 8;
    static constexpr int64_t kK = (kBand ? 4096 : 2048) / kBytes;
    // As in a layer: neither rows nor panels start a power of two apart, except for rows of weights.
    static constexpr int64_t kRowStride = kBand ? kK : staged_row_stride<C>(kK);
    static constexpr int64_t kPanelStride = panel_elements<C>(kK) + 64 / kBytes;

public:
    static constexpr double kFlops = 2.0 * kRows * kPanels * kPanelColumns * kK;

    explicit ProductsFromL2(Workspace& workspace)
        : rows_(workspace.take<C>(kRows * kRowStride)),
          panels_(workspace.take<C>(kPanels * kPanelStride)),
          sums_(workspace.take<Acc<C>>(kRowStep * kPanels * kPanelColumns)) {}

    // Random numbers in [-1, 1): on some CPUs, products of constants are faster.
    void fill() const {
        uint32_t state = 1;
        const auto next = [&] {
            state = state * 1664525 + 1013904223;  // Numerical Recipes
            return convert<C>(static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f);
        };
        for (int64_t i = 0; i < kRows * kRowStride; ++i) rows_[i] = next();
        for (int64_t i = 0; i < kPanels * kPanelStride; ++i) panels_[i] = next();
    }

    void multiply() const {
        if constexpr (kBand) {
            multiply_band();
        } else {
            for (int64_t i = 0; i < kRows; i += Micro::kRows) multiply_rows(i, smaller(Micro::kRows, kRows - i));
        }
    }

private:
    void multiply_band() const {
        BandArguments<C> g{};
        g.halves = 2;
        g.panels = 2;
        g.rows[0] = rows_;
        g.rows[1] = rows_ + kHalfRows * kRowStride;
        g.row_stride = kRowStride;
        g.b_stride = kPanelStride;
        g.k = kK;
        g.tiles = sums_;
        ReadAhead none;
        for (int64_t p = 0; p < kPanels; p += g.panels) {
            g.b = panels_ + p * kPanelStride;
            Micro::band(g, none);
        }
    }

    void multiply_rows(int64_t first, int64_t m) const {
        const C* rows[Micro::kRows];
        for (int64_t i = 0; i < m; ++i) rows[i] = rows_ + (first + i) * kRowStride;
        for (int64_t p = 0; p < kPanels; p += Micro::kPanels) {
            const int64_t panels = smaller(Micro::kPanels, kPanels - p);
            Micro::gemm({static_cast<int>(m), static_cast<int>(panels), rows, kPack<C>, panels_ + p * kPanelStride,
                         kPanelStride, kK / kPack<C>, sums_ + p * kPanelColumns, kPanels * kPanelColumns, false});
        }
    }

    C *rows_, *panels_;
    Acc<C>* sums_;
};

// Returns FLOP/s. An iteration is 8 MFLOP (bfloat16 in bands) or less.
template <class C>
inline double peak_from_l2(int64_t iterations) {
    Workspace counting;
    const ProductsFromL2<C> counted(counting);
    Workspace workspace(counting.bytes());
    const ProductsFromL2<C> products(workspace);
    products.fill();
    [[maybe_unused]] const typename Isa::Region region;
    products.multiply();  // brings both operands into L2
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < iterations; ++i) products.multiply();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(iterations) * ProductsFromL2<C>::kFlops / seconds.count();
}

}  // namespace kt::KT_ISA
