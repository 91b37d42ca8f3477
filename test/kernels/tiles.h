// Kernels with AMX tiles.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm.h"
#include "isa/micro_dots_amx_int8-inl.h"
#include "isa/micro_gemm_amx_bf16-inl.h"

namespace suites {

using kt::KT_ISA::kTileElements;
using kt::KT_ISA::kTileK;
using Tiles = MicroGemm<bfloat16>;

// Tiles [rows / 16][k / 32][16][32] must hold value(i, s) in rows i < m, with zeros for s >= k.
template <class F>
std::string check_tiles(Output<bfloat16>& out, int64_t m, int64_t k, F value) {
    const int64_t tiles = ceil_div(k, kTileK);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t s = 0; s < tiles * kTileK; ++s) {
            const int64_t tile = i / 16 * tiles + s / kTileK;
            const bfloat16 x = out[tile * kTileElements + i % 16 * kTileK + s % kTileK];
            if (!same(x, s < k ? value(i, s) : bfloat16{}))
                return "element " + std::to_string(s) + " of row " + std::to_string(i);
        }
    }
    return expect(out.guarded(), "written out of bounds");
}

template <class>
struct stage_tiles {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", 32, 32), k = shape.size("k", 67, 0, 32);
        Matrix<bfloat16> x(m, k, shape.stride(k));
        std::vector<const bfloat16*> rows;
        for (int64_t i = 0; i < m; ++i) rows.push_back(x.row(i));
        Output<bfloat16> out(round_up(m, 16) * round_up(k, 32));
        const bfloat16* a[1];
        Tiles::stage(rows.data(), m, k, out.data(), a);
        return check_tiles(out, m, k, [&](int64_t i, int64_t s) { return x.row(i)[s]; });
    }
};

template <class>
struct stage_panels {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", 32, 32), k = shape.size("k", 67, 0, 32);
        const int64_t first = shape.is("first", "32") ? 32 : 0;
        Panels<bfloat16> x(k, first + m, 0);
        Output<bfloat16> out(round_up(m, 16) * round_up(k, 32));
        const bfloat16* a[1];
        Tiles::stage_panels(x.data(), x.stride, first, m, out.data(), a);
        return check_tiles(out, m, k, [&](int64_t i, int64_t s) { return x.source.row(s)[first + i]; });
    }
};

struct tile_dots {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", 32, 32), n = shape.size("columns", 32, 32), steps = shape.size("steps", 3, 0);
        const int64_t k = steps * TileDots::kColumns, stride = shape.stride(k), panel_stride = shape.stride(16 * k);
        Input<uint8_t> w((round_up(n, 16) - 1) * stride + k);
        Input<uint8_t> x((ceil_div(m, 16) - 1) * panel_stride + 16 * k);
        for (int64_t i = 0; i < w.size(); ++i) w[i] = static_cast<uint8_t>(random_integer(0, 255));
        for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(random_integer(0, 255));
        Output<int32_t> sums(32 * 32);
        TileDots::multiply(w.data(), stride, n, x.data(), panel_stride, m, steps, sums.data(), {w.data(), 0, 0, 0});
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < m; ++j) {
                int32_t exact = 0;
                for (int64_t s = 0; s < k; ++s) {
                    const uint8_t code = x[j / 16 * panel_stride + s / 4 * 64 + j % 16 * 4 + s % 4];
                    exact += w[i * stride + s] * static_cast<int8_t>(code);
                }
                if (sums[i * 32 + j] != exact) return "row " + std::to_string(i) + " by " + std::to_string(j);
            }
        }
        return expect(sums.guarded(), "written out of bounds");
    }
};

}  // namespace suites
