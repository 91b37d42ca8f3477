#pragma once

#include <utility>

#include "formats/format_table.h"
#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

// A row of k elements in the order of chunks (split or not), zeros up to a whole chunk.
template <class T>
inline void order(const T* x, int64_t k, bool split, float* out) {
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
        float part[kChunk] = {};
        const int64_t n = smaller(kChunk, k - i);
        for_each_vector<float>(n,
                               [&](int64_t j, int64_t count) { store_n(part + j, load_n(x + i + j, count), count); });
        for (int64_t j = 0; j < kChunk; ++j) out[j] = split ? part[j % (kChunk / 2) * 2 + j / (kChunk / 2)] : part[j];
    }
}

// The even or the odd ones of two vectors.
template <int kOdd, int... Is>
inline VecI32 every_second(VecI32 a, VecI32 b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, (2 * Is + kOdd)...);
}

inline void store_bytes(VecI32 x, int8_t* out) {
    const auto bytes = __builtin_convertvector(x, VecI8);
    std::memcpy(out, &bytes, sizeof(bytes));
}

// The largest |x| of k elements; NaN if one is, or infinite.
template <class T>
inline float largest_of(const T* x, int64_t k) {
    constexpr int N = 4;  // maxima that do not wait for each other
    VecI32 most[N] = {};  // bits of floats that are not negative are in the order of the floats
    const auto bits = [](VecF v) { return bit_cast<VecI32>(v) & 0x7fffffff; };
    const auto add = [](VecI32& most, VecI32 v) { most = most > v ? most : v; };
    int64_t j = 0;
    for (; j + N * kLanes<float> <= k; j += N * kLanes<float>) {
        for (int i = 0; i < N; ++i) add(most[i], bits(load(x + j + i * kLanes<float>)));
    }
    for_each_vector<float>(k - j, [&](int64_t i, int64_t n) { add(most[0], bits(load_n(x + j + i, n))); });
    for (int i = 1; i < N; ++i) add(most[0], most[i]);
    int32_t largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = largest >= most[0][lane] ? largest : most[0][lane];
    return bit_cast<float>(largest < 0x7f800000 ? largest : 0x7fc00000);
}

// Row i of `rows` from k elements: round(x / scale) with scale = max |x| / 127.
template <class T>
inline void quantize_row(const T* x, int64_t k, const CodedRows& rows, int64_t i) {
    constexpr int64_t kUnit = CodedRows::kUnit, L = kLanes<float>;
    const float largest = largest_of(x, k);
    const float inverse = largest > 4e-37f ? 127 / largest : 0;  // of less it is infinite: zeros then
    rows.scale[i] = largest / 127;
    float* sums = rows.sums + i * rows.sums_stride;
    for (int64_t g = 0; g < rows.sums_stride; ++g) sums[g] = 0;
    VecI32 sum{};  // of the group that ends with group_end
    int64_t group_end = rows.group;
    // Columns [j, j + L) lie in one group.
    const auto codes = [&](int64_t j) __attribute__((always_inline)) {
        VecF v = j + L <= k ? load(x + j) : j < k ? load_partial(x + j, k - j) : VecF{};
        v = v * inverse;
        __asm__("" : "+x"(v));  // the product is a float32 before it is an integer: no fused multiply-add
        const VecI32 integers = bit_cast<VecI32>(v + kRound) - kRoundBits;
        if (j >= group_end) {
            *sums++ = sum_lanes<float>(to_floats(sum));
            group_end += rows.group;
            sum = VecI32{};
        }
        sum += integers;
        return integers;
    };
    int8_t* out = rows.codes + i * rows.stride;
    for (int64_t j = 0; j < rows.stride; j += kUnit, out += kUnit) {
        for (int64_t s = 0; s < kUnit; s += 2 * L) {
            const VecI32 a = codes(j + s), b = codes(j + s + L);
            if (rows.pairs) {
                store_bytes(every_second<0>(a, b, std::make_integer_sequence<int, L>()), out + s / 2);
                store_bytes(every_second<1>(a, b, std::make_integer_sequence<int, L>()), out + (kUnit + s) / 2);
            } else {
                store_bytes(a, out + s);
                store_bytes(b, out + s + L);
            }
        }
    }
    *sums = sum_lanes<float>(to_floats(sum));
}

}  // namespace kt::KT_ISA
