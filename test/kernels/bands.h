// Bands of rows of a weight.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "gemm.h"
#include "isa/bands_avx512-inl.h"

namespace suites {

using kt::KT_ISA::BandArguments;
using kt::KT_ISA::kBandK;
using kt::KT_ISA::kBandPanels;
using kt::KT_ISA::kHalfRows;
using kt::KT_ISA::kTileSums;

// Where element (row of the band, column of the panels) is in the tiles.
inline int64_t in_tiles(int64_t row, int64_t column) {
    const int64_t tile = row / kHalfRows * kBandPanels + column / kPanelColumns;
    return tile * kTileSums + row % kHalfRows * kPanelColumns + column % kPanelColumns;
}

template <class>
struct band {
    static std::string run(const Shape& shape) {
        for (int halves = 1; halves <= 2; ++halves) {
            for (int panels = 1; panels <= kBandPanels; ++panels) {
                const std::string result = run(shape, halves, panels);
                if (result != "ok") return std::to_string(halves) + " by " + std::to_string(panels) + ": " + result;
            }
        }
        return "ok";
    }

private:
    static std::string run(const Shape& shape, int halves, int panels) {
        const int64_t m = halves * kHalfRows, n = panels * kPanelColumns, k = shape.size("k", 64, 0, kBandK);
        const bool adds = shape.is("adds", "1");
        Matrix<bfloat16> w(m, k, shape.stride(k));
        Panels<bfloat16> x(k, n, shape.stride(0));
        Output<float> tiles(2 * kBandPanels * kTileSums);
        Product<float> product(m, n, n, n, m, adds);
        const auto each = [&](auto f) {
            for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < n; ++j) f(tiles[in_tiles(i, j)], product.c[i * n + j]);
            }
        };
        if (adds) each([](float& tile, float c) { tile = c; });
        // Streams that prefetch what cannot be read, and more rows than there are steps for.
        ReadAhead ahead;
        ahead.start({nullptr, reinterpret_cast<const char*>(w.row(0))}, kHalfRows, 2 * k, 2 * w.stride, k / kBandK);
        BandArguments<bfloat16> g{halves,   panels,       {w.row(0), w.row(halves > 1 ? kHalfRows : 0)},
                                  w.stride, x.data(),     x.stride,
                                  k,        tiles.data(), adds};
        MicroGemm<bfloat16>::band(g, ahead);
        each([](float tile, float& c) { c = tile; });
        if (!tiles.guarded()) return "written out of bounds of the tiles";
        return product.check(
            k, [&](int64_t i, int64_t s) { return w.at(i, s); },
            [&](int64_t s, int64_t j) { return x.source.at(s, j); });
    }
};

template <class>
struct put_band {
    static std::string run(const Shape& shape) {
        const int64_t columns = shape.size("columns", kHalfRows, kHalfRows), ldc = shape.stride(columns);
        const int panels = static_cast<int>(shape.size("panels", kBandPanels, kBandPanels));
        for (int half = 0; half < 2; ++half) {
            Input<float> tiles(2 * kBandPanels * kTileSums);
            for (int64_t i = 0; i < tiles.size(); ++i) tiles[i] = static_cast<float>(i);
            BandArguments<bfloat16> g{};
            g.panels = panels;
            g.tiles = tiles.data();
            const int64_t m = panels * kPanelColumns, before = kHalfRows - columns;
            Output<float> c((m - 1) * ldc + columns);
            kt::KT_ISA::put_band(g, half, columns, c.data(), ldc);
            for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < ldc && i * ldc + j < c.size(); ++j) {
                    const bool inside = j < columns;
                    const float expected = inside ? tiles[in_tiles(half * kHalfRows + before + j, i)] : 0;
                    if (inside ? c[i * ldc + j] != expected : !c.untouched(i * ldc + j))
                        return "element " + std::to_string(j) + " of row " + std::to_string(i);
                }
            }
            if (!c.guarded()) return "written out of bounds";
        }
        return "ok";
    }
};

}  // namespace suites
