#pragma once

// Vectors of one register, written with the compiler's vector extension: the same source compiles to SSE2, AVX2 or
// AVX-512 by the target in force and KT_VECTOR_BYTES.

#include <cstdint>
#include <cstring>

#include "core/bfloat16.h"
#include "core/views.h"

namespace kt::KT_ISA {

template <class A>
struct VecOf {
    typedef A type __attribute__((vector_size(KT_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
constexpr int kLanes = KT_VECTOR_BYTES / static_cast<int>(sizeof(A));

typedef uint32_t VecU32 __attribute__((vector_size(KT_VECTOR_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(KT_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(KT_VECTOR_BYTES / 2)));  // as many lanes as VecU32

typedef int8_t VecI8 __attribute__((vector_size(KT_VECTOR_BYTES / 4)));  // as many lanes as VecI32
typedef uint8_t VecU8 __attribute__((vector_size(KT_VECTOR_BYTES / 4)));

// Halves of 32 bits each, zero-extended. GCC 12 makes five instructions of one zmm's conversion.
inline VecU32 widen(VecU16 x) {
#if KT_VECTOR_BYTES == 64
    return (VecU32)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, VecU32);
#endif
}

template <class V, class P>
inline V load_bits(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

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

// The upper halves of float32, rounded to nearest even: bfloat16 in 32 bits.
inline VecU32 round_to_bfloat16(Vec<float> v) {
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU32 nan = VecU32{} + 0x7fc0;
    return v == v ? rounded : nan;
}

// Adding it to numbers of at most 2^22 leaves the nearest integer, plus kRoundBits, in the bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000;

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bfloat16* p, Vec<float> v) {
    const VecU16 out = __builtin_convertvector(round_to_bfloat16(v), VecU16);
    std::memcpy(p, &out, sizeof(out));
}

// The first n lanes only; the others read as zero.
template <class V, class P>
inline V load_bits_partial(const P* p, int64_t n) {
    V v{};
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(P));
    return v;
}
#if KT_VECTOR_BYTES == 64
template <>
inline VecU8 load_bits_partial<VecU8>(const uint8_t* p, int64_t n) {
    return (VecU8)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
}
template <>
inline VecU16 load_bits_partial<VecU16>(const uint16_t* p, int64_t n) {
    return (VecU16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
#endif
template <class T>
inline auto load_partial(const T* p, int64_t n) {
    T lanes[kLanes<Acc<T>>] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
}
inline Vec<float> load_partial(const bfloat16* p, int64_t n) {
    return from_bfloat16(load_bits_partial<VecU16>(reinterpret_cast<const uint16_t*>(p), n));
}
template <class T>
inline void store_partial(T* p, Vec<Acc<T>> v, int64_t n) {
    T lanes[kLanes<Acc<T>>];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

#if KT_VECTOR_BYTES == 64
inline Vec<float> load_partial(const float* p, int64_t n) {
    return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline void store_partial(float* p, Vec<float> v, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
#endif

// f(i, n) for consecutive pieces [i, i + n) of [0, count), with n = kLanes but for the last.
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

template <class A>
inline A sum_lanes(Vec<A> v) {
    A lanes[kLanes<A>];
    store(lanes, v);
    for (int width = kLanes<A> / 2; width; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

}  // namespace kt::KT_ISA
