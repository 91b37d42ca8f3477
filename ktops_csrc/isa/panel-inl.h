#pragma once

// Panels: the layout of an operand's block for micro-kernels, the same on every ISA.
//
//   [k_steps][16][kPack]    16 columns; a k-step is kPack consecutive elements of k: a pair for bfloat16, else one.
//                           One AMX tile is 16 of these rows, one zmm register is one row.

#include <cstdint>
#include <type_traits>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "core/views.h"

namespace kt::KT_ISA {

constexpr int64_t kPanelColumns = 16;

// The type in which T is multiplied: float16, and bfloat16 on an ISA without a dot product for it, are widened to
// float32. (bfloat16 would lose three of the eleven bits of float16.)
template <class T>
constexpr bool kWidened = std::is_same_v<T, float16> || (std::is_same_v<T, bfloat16> && !Isa::kBFloat16Dot);
template <class T>
using Compute = std::conditional_t<kWidened<T>, float, T>;

template <class C>
constexpr int64_t kPack = std::is_same_v<C, bfloat16> ? 2 : 1;

// Panels end with zeros up to a multiple of this many elements of k: a k-step, or a whole tile.
template <class C>
constexpr int64_t kKMultiple = std::is_same_v<C, bfloat16> ? Isa::kBFloat16KMultiple : 1;

template <class C>
constexpr int64_t panel_elements(int64_t k) {
    return round_up(k, kKMultiple<C>) * kPanelColumns;
}

template <class C, class T>
inline C convert(T x) {
    if constexpr (std::is_same_v<C, T>) {
        return x;
    } else {
        return from_float<C>(static_cast<Acc<C>>(to_float(x)));
    }
}

}  // namespace kt::KT_ISA
