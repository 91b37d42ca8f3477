#pragma once

#include <immintrin.h>

#include <chrono>
#include <cstdint>

#include "isa/micro_gemm_amx_bf16-inl.h"
#include "isa/peak-inl.h"

namespace kt::KT_ISA {

template <class Products>
inline double peak_tiles(int64_t iterations, double flops, Products products) {
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
    for (int64_t i = 0; i < iterations; ++i) products();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(iterations) * 4 * flops / seconds.count();
}

inline double peak_bfloat16_tiles(int64_t iterations) {
    return peak_tiles(iterations, 2.0 * 16 * 16 * 32, [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    });
}

// A product or a sum counts as one operation.
inline double peak_int8_tiles(int64_t iterations) {
    return peak_tiles(iterations, 2.0 * 16 * 16 * 64, [] {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    });
}

}  // namespace kt::KT_ISA
