#pragma once

// The kernels of an ISA, as its row of dispatch/table.h lists them. Included last, after what they are made of.

#include <cstdint>

#include "dispatch/table.h"
#include "isa/panel-inl.h"
#include "isa/peak-inl.h"
#include "isa/peak_from_l2-inl.h"
#include "moe/backward-inl.h"
#include "moe/forward-inl.h"

namespace kt::KT_ISA {

// peak: of the multiply-add for T.
template <class T>
constexpr MoeKernels moe_kernels(double (*peak)(int64_t) = peak_float32) {
    return {Forward<T>::run, Backward<T>::run, peak, peak_from_l2<Compute<T>>};
}
constexpr MoeKernels float64_kernels() {
    return {forward_float64, backward_float64, peak_float32, peak_from_l2<float>};
}

}  // namespace kt::KT_ISA
