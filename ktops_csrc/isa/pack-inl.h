#pragma once

// Packs a block of a dense row-major matrix into a panel, padded with zeros.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/panel-inl.h"
#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Packs 64 bytes of each of 16 rows: 16 k-steps of float32 or of pairs of bfloat16, or 32 of widened numbers.
template <class T, class C>
inline void transpose_block(const T* w, int64_t stride, C* out) {
    const auto* rows = reinterpret_cast<const char*>(w);
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
    if constexpr (std::is_same_v<T, C>) {
        transpose_16x16(rows, bytes, reinterpret_cast<uint32_t*>(out));
    } else {
        alignas(64) uint32_t pairs[16 * kPanelColumns];
        transpose_16x16(rows, bytes, pairs);
        for (int k = 0; k < 16; ++k, out += 2 * kPanelColumns) {
            for (int j = 0; j < kPanelColumns; j += kLanes<float>) {
                const VecU32 pair = load_bits<VecU32>(pairs + k * kPanelColumns + j);
                store(out + j, widen_half<T>(pair, 0));
                store(out + kPanelColumns + j, widen_half<T>(pair, 1));
            }
        }
    }
}

// Columns of the panel are n <= 16 rows of the matrix, `stride` apart; k runs along a row (y = x W^T). w: the first
// row.
template <class T>
inline void pack_nt(const T* w, int64_t stride, int64_t n, int64_t kn, Compute<T>* panel) {
    using C = Compute<T>;
    constexpr int64_t P = kPack<C>, kBlock = 64 / static_cast<int64_t>(sizeof(T));
    int64_t k = 0;
    if constexpr (sizeof(T) <= 4) {
        if (n == kPanelColumns) {
            for (; k + kBlock <= kn; k += kBlock) {
                for (int64_t j = kPanelColumns; j < 2 * kPanelColumns; ++j) {
                    __builtin_prefetch(w + j * stride + k, 0, 2);  // the next panel, most likely
                }
                transpose_block(w + k, stride, panel + k * kPanelColumns);
            }
        }
    }
    for (const int64_t end = round_up(kn, kKMultiple<C>); k < end; k += P) {
        C* out = panel + k * kPanelColumns;
        for (int64_t j = 0; j < kPanelColumns; ++j) {
            for (int64_t p = 0; p < P; ++p) {
                out[j * P + p] = j < n && k + p < kn ? convert<C>(read(w + j * stride + k + p)) : C{};
            }
        }
    }
}

// Columns of the panel are n <= 16 columns of kn elements. copy(column, k, count, to) copies `count` elements from k
// on, at most 64 bytes.
template <class C, class Copy>
inline void pack_columns(int64_t n, int64_t kn, C* panel, Copy copy) {
    constexpr int64_t kBlock = 64 / static_cast<int64_t>(sizeof(C));
    alignas(64) C block[kPanelColumns * kBlock] = {};
    for (int64_t k = 0; k < kn; k += kBlock, panel += kPanelColumns * kBlock) {
        const int64_t count = smaller(kBlock, kn - k);
        if (count < kBlock) std::memset(static_cast<void*>(block), 0, sizeof(block));
        for (int64_t j = 0; j < n; ++j) copy(j, k, count, block + j * kBlock);
        if (sizeof(C) <= 4 && (count == kBlock || kKMultiple<C> == kBlock)) {
            transpose_block(block, kBlock, panel);
        } else {
            pack_nt(block, kBlock, kPanelColumns, count, panel);
        }
    }
}

// Columns of the panel are rows [first, first + n), n <= 16, of kn elements, which fill whole blocks of 64 bytes.
template <class C>
inline void pack_rows(const Rows<C>& rows, int64_t first, int64_t n, int64_t kn, C* panel) {
    pack_columns(n, kn, panel, [&](int64_t j, int64_t k, int64_t, C* to) {
        std::memcpy(static_cast<void*>(to), rows.row(first + j) + k, 64);
    });
}

// out = n elements of row times factor, then zeros; only zeros if row is null.
template <class C, class T>
inline void copy_row(const T* row, int64_t n, Acc<T> factor, C* out) {
    for (int64_t j = 0; j < kPanelColumns; j += kLanes<Acc<T>>) {
        const int64_t count = row ? smaller(kLanes<Acc<T>>, n - j) : 0;
        store(out + j, count > 0 ? load_n(row + j, count) * factor : Vec<Acc<T>>{});
    }
}

inline void interleave(const bfloat16* even, const bfloat16* odd, bfloat16* out) {
    for (int j = 0; j < kPanelColumns; j += kLanes<float>) {
        const VecU32 low = widen(load_bits<VecU16>(even + j));
        const VecU32 high = widen(load_bits<VecU16>(odd + j));
        const VecU32 pairs = low | high << 16;
        std::memcpy(static_cast<void*>(out + 2 * j), &pairs, sizeof(pairs));
    }
}

// Columns of the panel are n <= 16 columns of the matrix; k runs down the rows (dx = dy W), row k times factor(k).
// Packs only k in [begin, end), which lies within [0, round_up(kn, kKMultiple)); begin is at a k-step.
template <class C, class S, class Factor>
inline void pack_nn_scaled(Rows<S> w, int64_t column, int64_t n, int64_t kn, C* panel, Factor factor, int64_t begin,
                           int64_t end) {
    const auto copy = [&](int64_t k, C* out) {
        const bool inside = k < kn;
        copy_row(inside ? w.row(k) + column : nullptr, n, inside ? factor(k) : Acc<C>{}, out);
    };
    panel += begin * kPanelColumns;
    for (int64_t k = begin; k < end; k += kPack<C>, panel += kPack<C> * kPanelColumns) {
        if constexpr (kPack<C> == 1) {
            copy(k, panel);
        } else {
            C even[kPanelColumns], odd[kPanelColumns];
            copy(k, even);
            copy(k + 1, odd);
            interleave(even, odd, panel);
        }
    }
}

// Packs n columns into panels, `stride` elements apart: a few rows at a time into all panels, to read memory row by
// row.
template <class T>
inline void pack_nn(Rows<T> w, int64_t column, int64_t n, int64_t kn, Compute<T>* panels, int64_t stride) {
    using C = Compute<T>;
    constexpr int64_t kBlock = 8, kAhead = 32;  // rows
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t padded = round_up(kn, kKMultiple<C>);
    for (int64_t k = 0; k < padded; k += kBlock) {
        const int64_t end = smaller(k + kBlock, padded);
        for (int64_t i = k + kAhead; i < smaller(end + kAhead, kn); ++i) {
            for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(w.row(i) + column + j, 0, 2);
        }
        C* panel = panels;
        for (int64_t j = 0; j < n; j += kPanelColumns, panel += stride) {
            int64_t next = k;
            if constexpr (kPack<C> == 2) {
                for (; n - j >= kPanelColumns && next + 1 < smaller(end, kn); next += 2) {
                    interleave(w.row(next) + column + j, w.row(next + 1) + column + j, panel + next * kPanelColumns);
                }
            }
            pack_nn_scaled(
                w, column + j, smaller(kPanelColumns, n - j), kn, panel, [](int64_t) { return Acc<C>{1}; }, next, end);
        }
    }
}

// pack_nt times a factor, from elements of another type.
template <class C, class S>
inline void pack_nt_scaled(const S* w, int64_t stride, int64_t n, int64_t kn, C* panel, Acc<C> factor) {
    pack_columns(n, kn, panel, [&](int64_t j, int64_t k, int64_t count, C* to) {
        for_each_vector<Acc<C>>(count, [&](int64_t i, int64_t lanes) {
            store_n(to + i, load_n(w + j * stride + k + i, lanes) * factor, lanes);
        });
    });
}

}  // namespace kt::KT_ISA
