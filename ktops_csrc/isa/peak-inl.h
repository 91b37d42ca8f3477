#pragma once

// Measures the peak multiply-add rate of one thread, for rooflines.

#include <chrono>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/views.h"
#include "isa/dot4-inl.h"
#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Independent accumulators: enough to hide the latency of two multiply-add units, few enough for the registers.
constexpr int kPeakChains = Isa::kVectorBytes == 64 ? 24 : 12;

// x in every lane, converted to the type of the lanes.
template <class V>
inline V of_lanes(float x) {
    using Lane = std::decay_t<decltype(V{}[0])>;
    return V{} + static_cast<Lane>(x);
}

template <class V, class Step, int... Is>
inline double peak_flops(int64_t iterations, double flops_a_step, Step step, std::integer_sequence<int, Is...>) {
    float start_values[] = {static_cast<float>(Is)...};
    __asm__ volatile("" : "+m"(start_values));  // opaque and different, so that no two chains are merged
    V acc[] = {of_lanes<V>(start_values[Is])...};
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < iterations; ++i) ((acc[Is] = step(acc[Is])), ...);
    V sum = (acc[Is] + ...);
    __asm__ volatile("" : "+m"(sum));  // used, so that nothing is optimized out
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(iterations) * sizeof...(Is) * flops_a_step / seconds.count();
}

inline double peak_float32(int64_t iterations) {
    Vec<float> a = broadcast(1.0f), b = a;
    __asm__ volatile("" : "+m"(a), "+m"(b));  // opaque, so that nothing is folded
    return peak_flops<Vec<float>>(
        iterations, 2.0 * kLanes<float>, [a, b](Vec<float> c) { return c + a * b; },
        std::make_integer_sequence<int, kPeakChains>());
}

// sum + 4 * weights * x, four products per lane: as MicroDots adds up four steps, for codes that fit in words.
inline VecDots add_four_dots(VecDots sum, VecCodes weights, VecCodes x) {
    VecWords words{};
    for (int i = 0; i < 4; ++i) {
        if constexpr (Isa::kByteDot) {
            sum = dot4<kAnyCode>(sum, weights, x);
            continue;
        } else if constexpr (kCodeBytes == Isa::kVectorBytes) {
            __asm__ volatile("" : "+v"(weights));  // opaque, so that products are not computed once for all
        } else {
            __asm__ volatile("" : "+m"(weights));
        }
        words += multiply_bytes(weights, x);
    }
    return Isa::kByteDot ? sum : add_words(sum, words);
}

// For 8-bit integers, a product or a sum counts as one operation.
inline double peak_int8(int64_t iterations) {
    VecCodes a = VecCodes{} + 1, b = a;
    __asm__ volatile("" : "+m"(a), "+m"(b));
    return peak_flops<VecDots>(
        ceil_div(iterations, 4), 2.0 * 4 * kCodeBytes, [a, b](VecDots c) { return add_four_dots(c, a, b); },
        std::make_integer_sequence<int, kPeakChains>());
}

}  // namespace kt::KT_ISA
