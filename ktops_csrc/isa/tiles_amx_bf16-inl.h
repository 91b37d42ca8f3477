#pragma once

// The tiles of a thread, and products of bfloat16 with up to 2 x 2 of them, TDPBF16PS.
//
//   tmm0 tmm1    C: rows 0-15  x columns 0-15, 16-31     16 x 16 float32 each
//   tmm2 tmm3       rows 16-31 x columns 0-15, 16-31
//   tmm4         A: rows 0-15, then rows 16-31           16 x 32 bfloat16
//   tmm5 tmm6    B: columns 0-15, 16-31                  16 pairs of k x 16 columns
//
// A step is 32 elements of k: four tile loads and four products. tmm7 is not used: a CPU may run short of tile
// registers (decision 7).

#include <immintrin.h>

#include <cstdint>

#include "core/bfloat16.h"
#include "core/views.h"

namespace kt::KT_ISA {

// Configures eight tiles of 16 rows of 64 bytes on this thread, from construction to destruction.
struct TileRegion {
    TileRegion() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        settle(&config);
        _tile_loadconfig(&config);
    }
    ~TileRegion() { _tile_release(); }

    // Makes the compiler finish its stores, since it does not know which memory tile instructions read.
    static void settle(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }
};

constexpr int64_t kTileK = 32, kTileElements = 16 * kTileK;  // of bfloat16

// Sums are in those of tmm0 to tmm5 whose bits are set in kSums. In memory, tmm<i> is at(i), rows `stride` bytes apart.
template <unsigned kSums>
inline __attribute__((always_inline)) void clear_sums() {
    if constexpr (kSums & 1) _tile_zero(0);
    if constexpr (kSums & 2) _tile_zero(1);
    if constexpr (kSums & 4) _tile_zero(2);
    if constexpr (kSums & 8) _tile_zero(3);
    if constexpr (kSums & 16) _tile_zero(4);
    if constexpr (kSums & 32) _tile_zero(5);
}
template <unsigned kSums, class At>
inline __attribute__((always_inline)) void load_sums(int64_t stride, At at) {
    if constexpr (kSums & 1) _tile_loadd(0, at(0), stride);
    if constexpr (kSums & 2) _tile_loadd(1, at(1), stride);
    if constexpr (kSums & 4) _tile_loadd(2, at(2), stride);
    if constexpr (kSums & 8) _tile_loadd(3, at(3), stride);
    if constexpr (kSums & 16) _tile_loadd(4, at(4), stride);
    if constexpr (kSums & 32) _tile_loadd(5, at(5), stride);
}
template <unsigned kSums, class At>
inline __attribute__((always_inline)) void start_sums(bool accumulate, int64_t stride, At at) {
    TileRegion::settle(at(0));
    accumulate ? load_sums<kSums>(stride, at) : clear_sums<kSums>();
}
template <unsigned kSums, class At>
inline __attribute__((always_inline)) void store_sums(int64_t stride, At at) {
    if constexpr (kSums & 1) _tile_stored(0, at(0), stride);
    if constexpr (kSums & 2) _tile_stored(1, at(1), stride);
    if constexpr (kSums & 4) _tile_stored(2, at(2), stride);
    if constexpr (kSums & 8) _tile_stored(3, at(3), stride);
    if constexpr (kSums & 16) _tile_stored(4, at(4), stride);
    if constexpr (kSums & 32) _tile_stored(5, at(5), stride);
    TileRegion::settle(at(0));
}

// Copies A to tiles [rows / 16][k / 32][16][32], with zeros past the last element of k. Rows past m are left as they
// are, since they only affect rows of C past m.
inline void copy_to_tiles(const bfloat16* const* rows, int64_t m, int64_t k, bfloat16* out) {
    const int64_t tiles = ceil_div(k, kTileK);
    for (int64_t i = 0; i < m; ++i) {
        bfloat16* to = out + i / 16 * tiles * kTileElements + i % 16 * kTileK;
        const bfloat16* row = rows[i];
        for (int64_t t = 0; t + 1 < tiles; ++t) {
            _mm512_store_si512(to + t * kTileElements, _mm512_loadu_si512(row + t * kTileK));
        }
        const auto left = static_cast<uint32_t>(k - (tiles - 1) * kTileK);
        const __mmask32 mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
        _mm512_store_si512(to + (tiles - 1) * kTileElements,
                           _mm512_maskz_loadu_epi16(mask, row + (tiles - 1) * kTileK));
    }
}

// Up to two tiles of rows of A by two of columns of B, multiplied `steps` times. Strides are in elements.
struct TileOperands {
    const bfloat16* a[2];
    int64_t a_step, a_stride;  // along k; from row to row
    const bfloat16* b;
    int64_t b_right, b_step, b_stride;  // to the second tile; along k; from row to row
    int64_t steps;
    float* c[2];
    int64_t right, ldc;  // to the second tile; from row to row
    bool accumulate;
};

// The sums of M rows by P columns of tiles, numbered as above.
template <int M, int P>
constexpr unsigned kSumsOf = (P > 1 ? 3 : 1) * (M > 1 ? 5 : 1);

// ahead: calls panel(tile) for each tile of B, and step() once a step, while tiles are multiplied.
template <int M, int P, class Ahead>
inline void multiply_tiles(const TileOperands& g, Ahead& ahead) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(bfloat16));
    const int64_t lda = g.a_stride * kBytes, ldb = g.b_stride * kBytes;
    const int64_t ldc = g.ldc * static_cast<int64_t>(sizeof(float));
    const auto sums = [&](int i) { return g.c[i / 2] + i % 2 * g.right; };
    start_sums<kSumsOf<M, P>>(g.accumulate, ldc, sums);
    const bfloat16* b = g.b;
    for (int64_t t = 0; t < g.steps; ++t, b += g.b_step) {
        _tile_loadd(4, g.a[0] + t * g.a_step, lda);
        _tile_loadd(5, b, ldb);
        ahead.panel(b);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (P > 1) _tile_loadd(6, b + g.b_right, ldb);
        if constexpr (P > 1) ahead.panel(b + g.b_right);
        if constexpr (P > 1) _tile_dpbf16ps(1, 4, 6);
        if constexpr (M > 1) _tile_loadd(4, g.a[1] + t * g.a_step, lda);
        if constexpr (M > 1) _tile_dpbf16ps(2, 4, 5);
        if constexpr (M > 1 && P > 1) _tile_dpbf16ps(3, 4, 6);
        ahead.step();
    }
    store_sums<kSumsOf<M, P>>(ldc, sums);
}

template <class Ahead>
inline void multiply_tiles(bool two_rows, bool two_panels, const TileOperands& g, Ahead& ahead) {
    if (two_rows) return two_panels ? multiply_tiles<2, 2>(g, ahead) : multiply_tiles<2, 1>(g, ahead);
    two_panels ? multiply_tiles<1, 2>(g, ahead) : multiply_tiles<1, 1>(g, ahead);
}

}  // namespace kt::KT_ISA
