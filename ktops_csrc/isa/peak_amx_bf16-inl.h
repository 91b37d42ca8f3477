#pragma once

#include "isa/micro_gemm_amx_bf16-inl.h"
#include "isa/peak-inl.h"

namespace kt::KT_ISA {

inline double peak_bfloat16_tiles(int64_t iterations) {
    const TileRegion region;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < iterations; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(iterations) * 4 * (2.0 * 16 * 16 * 32) / seconds.count();
}

}  // namespace kt::KT_ISA
