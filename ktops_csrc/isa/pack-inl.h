#pragma once

// Re-orders a block of a dense row-major matrix into one panel: [k_steps][16][kPack], zero beyond the block.

#include "isa/micro_gemm_generic-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// 16 x 16 dwords: out[16 * k + n] = row n, dword k. Rows are `stride` bytes apart.
inline void transpose_16x16(const char* rows, int64_t stride, uint32_t* out) {
    for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 16; ++k) std::memcpy(out + 16 * k + n, rows + n * stride + 4 * k, 4);
    }
}

#ifndef KT_TRANSPOSE_16X16  // an ISA with a faster one names it
#define KT_TRANSPOSE_16X16 transpose_16x16
#endif

// Columns of the panel are n <= 16 rows of the matrix; k runs along a row (y = x W^T). w: first row; stride: of rows.
template <class T>
inline void pack_nt(const T* w, int64_t stride, int64_t n, int64_t kn, T* panel) {
    constexpr int64_t P = kPack<T>;
    int64_t k = 0;
    if constexpr (sizeof(T) * P == 4) {
        if (n == kPanelColumns) {
            for (; k + 16 * P <= kn; k += 16 * P) {
                KT_TRANSPOSE_16X16(reinterpret_cast<const char*>(w + k), stride * static_cast<int64_t>(sizeof(T)),
                                   reinterpret_cast<uint32_t*>(panel + k * kPanelColumns));
            }
        }
    }
    for (; k < kn; k += P) {
        T* out = panel + k * kPanelColumns;
        for (int64_t j = 0; j < kPanelColumns; ++j) {
            for (int64_t p = 0; p < P; ++p) out[j * P + p] = j < n && k + p < kn ? read(w + j * stride + k + p) : T{};
        }
    }
}

// out = n elements of row times factor, then zeros.
template <class T>
inline void copy_row(const T* row, int64_t n, Acc<T> factor, T* out) {
    for (int64_t j = 0; j < kPanelColumns; j += kLanes<Acc<T>>) {
        const int64_t count = row ? smaller(kLanes<Acc<T>>, n - j) : 0;
        store(out + j, count > 0 ? load_n(row + j, count) * factor : Vec<Acc<T>>{});
    }
}

// 16 columns of kPack rows, side by side.
template <class T>
inline void interleave(const T* const* rows, T* out) {
    std::memcpy(out, rows[0], kPanelColumns * sizeof(T));
}
inline void interleave(const bfloat16* const* rows, bfloat16* out) {
    for (int j = 0; j < kPanelColumns; j += kLanes<float>) {
        const VecU32 low = __builtin_convertvector(load_bits<VecU16>(rows[0] + j), VecU32);
        const VecU32 high = __builtin_convertvector(load_bits<VecU16>(rows[1] + j), VecU32);
        const VecU32 pairs = low | high << 16;
        std::memcpy(static_cast<void*>(out + 2 * j), &pairs, sizeof(pairs));
    }
}

// Columns of the panel are n <= 16 columns of the matrix; k runs down the rows (dx = dy W), row k times scale[k] if
// there is a scale.
template <class T>
inline void pack_nn(Rows<T> w, int64_t column, int64_t n, int64_t kn, T* panel, const Acc<T>* scale = nullptr) {
    constexpr int64_t P = kPack<T>;
    for (int64_t k = 0; k < kn; k += P, panel += P * kPanelColumns) {
        T edge[P][kPanelColumns];
        const T* rows[P];
        for (int64_t p = 0; p < P; ++p) {
            rows[p] = k + p < kn ? w.row(k + p) + column : edge[p];
            if (k + p < kn && n == kPanelColumns && !scale) continue;
            copy_row(k + p < kn ? rows[p] : nullptr, n, scale && k + p < kn ? scale[k + p] : Acc<T>{1}, edge[p]);
            rows[p] = edge[p];
        }
        interleave(rows, panel);
    }
}

}  // namespace kt::KT_ISA
