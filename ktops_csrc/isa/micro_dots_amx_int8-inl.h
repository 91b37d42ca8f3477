#pragma once

// Integer products with AMX tiles: 32 rows of W by 32 rows of activations, TDPBUSD.
//
//   tmm0 tmm1    sums: rows 0-15  of W x activations 0-15, 16-31     16 x 16 int32 each
//   tmm2 tmm3          rows 16-31 of W x activations 0-15, 16-31
//   tmm4         codes of W: rows 0-15, then rows 16-31              16 x 64, as they are decoded
//   tmm5 tmm6    activations: panel 0, 1                             16 steps of four codes x 16 rows
//
// A step is 64 columns: four tile loads and four products. The sums are those of C transposed.

#include <immintrin.h>

#include <cstdint>

#include "isa/micro_gemm_amx_bf16-inl.h"

namespace kt::KT_ISA {

struct TileDots {
    static constexpr int64_t kColumns = 64, kTileBytes = 1024, kRows = 32;

    // Prefetches to L2 during the steps: `bytes` per step of each of `rows` rows, `stride` apart.
    struct ReadAhead {
        const uint8_t* from;
        int64_t stride, rows, bytes;

        __attribute__((always_inline)) void step(int64_t t) const {
            for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(from + r * stride + t * bytes, 0, 2);
        }
    };

    // sums[32][32] = rows of w, `stride` bytes apart, times panels, over `steps` steps. n, m: the number of rows of w
    // and of activations, up to 32.
    static void multiply(const uint8_t* w, int64_t stride, int64_t n, const uint8_t* panels, int64_t panel_stride,
                         int64_t m, int64_t steps, int32_t* sums, const ReadAhead& ahead) {
        if (n > 16) {
            m > 16 ? kernel<2, 2>(w, stride, panels, panel_stride, steps, sums, ahead)
                   : kernel<2, 1>(w, stride, panels, panel_stride, steps, sums, ahead);
        } else {
            m > 16 ? kernel<1, 2>(w, stride, panels, panel_stride, steps, sums, ahead)
                   : kernel<1, 1>(w, stride, panels, panel_stride, steps, sums, ahead);
        }
    }

private:
    static constexpr int64_t kAhead = 2;  // steps, where panels come from L2

    template <int N, int M>
    static void kernel(const uint8_t* w, int64_t stride, const uint8_t* panels, int64_t panel_stride, int64_t steps,
                       int32_t* sums, const ReadAhead& ahead) {
        TileRegion::settle(w);
        clear_sums<kSumsOf<N, M>>();
        for (int64_t t = 0; t < steps; ++t) {
            const uint8_t* panel = panels + t * kTileBytes;
            _tile_loadd(4, w + t * kColumns, stride);
            _tile_loadd(5, panel, 64);
            prefetch_tile(panel + kAhead * kTileBytes);
            _tile_dpbusd(0, 4, 5);
            if constexpr (M > 1) {
                _tile_loadd(6, panel + panel_stride, 64);
                prefetch_tile(panel + panel_stride + kAhead * kTileBytes);
                _tile_dpbusd(1, 4, 6);
            }
            if constexpr (N > 1) {
                _tile_loadd(4, w + 16 * stride + t * kColumns, stride);
                _tile_dpbusd(2, 4, 5);
                if constexpr (M > 1) _tile_dpbusd(3, 4, 6);
            }
            ahead.step(t);
        }
        store_sums<kSumsOf<N, M>>(128, [&](int i) { return sums + i / 2 * 16 * 32 + i % 2 * 16; });
    }
};

}  // namespace kt::KT_ISA
