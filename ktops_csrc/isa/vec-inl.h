#pragma once

// Arithmetic on vectors of one register. The same source compiles to SSE2, AVX2 or AVX-512, depending on the target.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "isa/simd-inl.h"

namespace kt::KT_ISA {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class A>
inline Vec<A> broadcast(A x) {
    return x - Vec<A>{};
}

inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> from_bfloat16(VecU16 x) { return bit_cast<Vec<float>>(widen(x) << 16); }
inline Vec<float> load(const bfloat16* p) { return from_bfloat16(load_bits<VecU16>(p)); }
inline Vec<float> load(const float16* p) { return from_float16(load_bits<VecU16>(p)); }

// The number at p.
template <class T>
inline Acc<T> load_scalar(const T* p) {
    return to_float(read(p));
}
inline float load_scalar(const float16* p) { return float16_at(p); }

// Pairs of T in 32 bits each: those of even or of odd index.
template <class T>
inline Vec<float> widen_half(VecU32 pairs, int odd) {
    if constexpr (std::is_same_v<T, float16>) {
        return from_float16(__builtin_convertvector(odd ? pairs >> 16 : pairs & 0xffff, VecU16));
    } else {
        static_assert(std::is_same_v<T, bfloat16>);
        return bit_cast<Vec<float>>(odd ? pairs & 0xffff0000u : pairs << 16);
    }
}

// Rounds to bfloat16, to nearest even: the upper halves of float32, in the lower halves of 32 bits.
inline VecU32 round_to_bfloat16(Vec<float> v) {
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU32 nan = VecU32{} + 0x7fc0;
    return v == v ? rounded : nan;
}

// Adding kRound to a number of at most 2^22 leaves the nearest integer, plus kRoundBits, in its bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000;

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bfloat16* p, Vec<float> v) {
    const VecU16 out = __builtin_convertvector(round_to_bfloat16(v), VecU16);
    std::memcpy(p, &out, sizeof(out));
}

inline void store_past_caches(double* p, Vec<double> v) { store(p, v); }

inline void store(float16* p, Vec<float> v) {
    const VecU16 out = to_float16(v);
    std::memcpy(p, &out, sizeof(out));
}

// Only the first n lanes; the others read as zero.
inline Vec<double> load_partial(const double* p, int64_t n) { return load_lanes(p, n); }
inline Vec<float> load_partial(const bfloat16* p, int64_t n) {
    return from_bfloat16(load_partial(reinterpret_cast<const uint16_t*>(p), n));
}
inline Vec<float> load_partial(const float16* p, int64_t n) {
    return from_float16(load_partial(reinterpret_cast<const uint16_t*>(p), n));
}
template <class T>
inline void store_partial(T* p, Vec<Acc<T>> v, int64_t n) {
    T lanes[kLanes<Acc<T>>];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Calls f(i, n) for consecutive vectors [i, i + n) of [0, count), with n = kLanes except for the last.
template <class A, class F>
inline void for_each_vector(int64_t count, F f) {
    constexpr int64_t step = kLanes<A>;
    int64_t i = 0;
    for (; i + step <= count; i += step) f(i, step);
    if (i < count) f(i, count - i);
}
template <class T>
inline auto load_n(const T* p, int64_t n) {
    return n == kLanes<Acc<T>> ? load(p) : load_partial(p, n);
}
template <class T>
inline void store_n(T* p, Vec<Acc<T>> v, int64_t n) {
    if (n == kLanes<Acc<T>>) {
        store(p, v);
    } else {
        store_partial(p, v, n);
    }
}

// Deinterleaves two vectors: returns the even (first = 0) or odd (1) lanes of x, then those of y. join_lanes is the
// inverse: it interleaves the first (half = 0) or second (1) halves of x and y.
template <class V, int... Is>
inline V split_lanes(V x, V y, int first, std::integer_sequence<int, Is...>) {
    return first ? __builtin_shufflevector(x, y, (2 * Is + 1)...) : __builtin_shufflevector(x, y, (2 * Is)...);
}
template <class V, int... Is>
inline V join_lanes(V x, V y, int half, std::integer_sequence<int, Is...>) {
    constexpr int L = sizeof...(Is);
    return half ? __builtin_shufflevector(x, y, ((L + Is) / 2 + Is % 2 * L)...)
                : __builtin_shufflevector(x, y, (Is / 2 + Is % 2 * L)...);
}

template <class A>
inline A sum_lanes(Vec<A> v) {
    A lanes[kLanes<A>];
    store(lanes, v);
    for (int width = kLanes<A> / 2; width; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

// Folds the lanes of four vectors with op: combines halves of groups of G lanes until every group is one lane.
//
//   G = 16   [a][b], [c][d]  ->  8 lanes of a, 8 of b;  8 of c, 8 of d  ->  4 of each  ->  2  ->  a b c d
template <int G, class V, class Op, int... Is>
inline V fold_groups(V x, V y, Op op, std::integer_sequence<int, Is...>) {
    constexpr int H = G / 2;
    return op(__builtin_shufflevector(x, y, (Is / H * G + Is % H)...),
              __builtin_shufflevector(x, y, (Is / H * G + Is % H + H)...));
}
template <int G, class V, class Op>
inline V fold(V x, V y, Op op) {
    return fold_groups<G>(x, y, op, std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>());
}
template <int G, class V, class Op>
inline V fold_rest(V x, Op op) {
    if constexpr (G > 1) {
        return fold_rest<G / 2>(fold<G>(x, x, op), op);
    } else {
        return x;
    }
}
struct Plus {
    template <class V>
    V operator()(V a, V b) const {
        return a + b;
    }
};
struct Larger {
    template <class V>
    V operator()(V a, V b) const {
        return a > b ? a : b;
    }
};
template <class V, class Op, class A>
inline void put_folded(const V (&v)[4], Op op, A* out) {
    constexpr int L = sizeof(V) / sizeof(A);
    const V folded = fold_rest<L / 4>(fold<L / 2>(fold<L>(v[0], v[1], op), fold<L>(v[2], v[3], op), op), op);
    std::memcpy(out, &folded, 4 * sizeof(A));
}

// Sums of N vectors, N <= 4.
template <class A, int N>
inline void put_sums(const Vec<A> (&v)[N], A* out) {
    if constexpr (N == 4 && kLanes<A> >= 4) {
        put_folded(v, Plus(), out);
    } else {
        for (int j = 0; j < N; ++j) out[j] = sum_lanes<A>(v[j]);
    }
}

}  // namespace kt::KT_ISA
