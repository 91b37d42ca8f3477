#pragma once

// The fastest that one thread can multiply and add: what rooflines are drawn against.

#include <chrono>
#include <utility>

#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Independent accumulators: enough to hide the latency of two multiply-add units, few enough for 16 registers.
constexpr int kPeakChains = 12;

template <class V, class Step, int... Is>
inline double peak_flops(int64_t iterations, double flops_a_step, V one, Step step, std::integer_sequence<int, Is...>) {
    V acc[sizeof...(Is)] = {((void)Is, one)...};
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < iterations; ++i) ((acc[Is] = step(acc[Is])), ...);
    V sum = (acc[Is] + ...);
    __asm__ volatile("" : "+m"(sum));  // used, so that nothing is left out
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(iterations) * sizeof...(Is) * flops_a_step / seconds.count();
}

inline double peak_float32(int64_t iterations) {
    const Vec<float> one = broadcast(1.0f);
    Vec<float> a = one, b = one;
    __asm__ volatile("" : "+m"(a), "+m"(b));  // opaque, so that nothing is folded
    return peak_flops(
        iterations, 2.0 * kLanes<float>, one, [a, b](Vec<float> c) { return c + a * b; },
        std::make_integer_sequence<int, kPeakChains>());
}

}  // namespace kt::KT_ISA
