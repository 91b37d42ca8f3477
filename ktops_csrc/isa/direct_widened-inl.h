#pragma once

// Steps of the direct kernels with bfloat16 widened to float32 by one instruction per vector: a shift for elements of
// even index, a mask for those of odd index.

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/bfloat16.h"
#include "isa/direct-inl.h"
#include "isa/panel-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Loads the first n elements; the others are zeros.
inline VecU32 load_pairs(const bfloat16* p, int64_t n) {
    if (n >= 2 * kLanes<float>) return load_bits<VecU32>(p);
    VecU32 pairs{};
    std::memcpy(&pairs, p, static_cast<size_t>(n) * sizeof(bfloat16));
    return pairs;
}

template <>
struct DotStep<bfloat16> {
    static constexpr int64_t kWidth = 2 * kLanes<float>;
    static constexpr int kParts = 2;
    static Vec<float> load(const bfloat16* p, int64_t n, int part) {
        return widen_half<bfloat16>(load_pairs(p, n), part);
    }
    static Vec<float> add(Vec<float> sum, Vec<float> x, Vec<float> y) { return sum + x * y; }
};

// Keeps the sums of even and odd columns in separate vectors until they are stored.
template <>
struct ColumnStep<bfloat16> {
    using V = Vec<float>;
    using Factor = float;
    static constexpr int64_t kRows = 1, kColumns = 2 * kLanes<float>;
    static constexpr int kVectors = 2;
    using Indices = std::make_integer_sequence<int, kLanes<float>>;

    static void load(const bfloat16* w, int64_t, int64_t, int64_t n, V* out) {
        const VecU32 pairs = load_pairs(w, n);
        out[0] = widen_half<bfloat16>(pairs, 0);
        out[1] = widen_half<bfloat16>(pairs, 1);
    }
    static V spread(const float* a, int64_t) { return broadcast(read(a)); }
    static V add(V sum, V x, V y) { return sum + x * y; }
    static void load_sums(const float* c, int64_t n, V* sums) {
        const V low = KT_ISA::load(c), high = has_high(n) ? KT_ISA::load(c + kLanes<float>) : V{};
        separate(low, high, sums, Indices());
    }
    static void store_sums(float* c, int64_t n, const V* sums) {
        store(c, weave<0>(sums, Indices()));
        if (has_high(n)) store(c + kLanes<float>, weave<kLanes<float>>(sums, Indices()));
    }

private:
    // c has room for a multiple of kPanelColumns columns.
    static bool has_high(int64_t n) { return kLanes<float> < kPanelColumns || n > kLanes<float>; }
    template <int... Is>
    static void separate(V low, V high, V* sums, std::integer_sequence<int, Is...>) {
        sums[0] = __builtin_shufflevector(low, high, (2 * Is)...);
        sums[1] = __builtin_shufflevector(low, high, (2 * Is + 1)...);
    }
    template <int kFirst, int... Is>
    static V weave(const V* sums, std::integer_sequence<int, Is...>) {
        constexpr int L = kLanes<float>;
        return __builtin_shufflevector(sums[0], sums[1], ((kFirst + Is) / 2 + (kFirst + Is) % 2 * L)...);
    }
};

}  // namespace kt::KT_ISA
