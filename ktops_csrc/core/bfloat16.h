#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

// The upper half of an IEEE float32.
struct bfloat16 {
    uint16_t bits;
};

// Reads one element at any address: checkpoints are mapped from files at any byte offset.
template <class T>
inline T read(const T* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

inline float to_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

// Rounds to nearest even; a NaN stays a (quiet) NaN.
template <class T, class A>
inline T from_float(A x) {
    return static_cast<T>(x);
}
template <>
inline bfloat16 from_float<bfloat16, float>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline bfloat16 from_float<bfloat16, double>(double x) {
    return from_float<bfloat16>(static_cast<float>(x));
}

// The type in which products of T are summed.
template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

}  // namespace kt
