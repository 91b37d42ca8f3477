#pragma once

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

// The even ones of a unit of codes, and then the odd ones.
inline void put_pairs(const int8_t* codes, int8_t* out) {
    constexpr int64_t kHalf = CodedRows::kUnit / 2;
    typedef uint16_t Words __attribute__((vector_size(KT_VECTOR_BYTES)));
    typedef int8_t Bytes __attribute__((vector_size(KT_VECTOR_BYTES / 2)));
    for (int64_t i = 0; i < kHalf; i += KT_VECTOR_BYTES / 2) {
        const auto pairs = load_bits<Words>(codes + 2 * i);
        const auto even = __builtin_convertvector(pairs, Bytes), odd = __builtin_convertvector(pairs >> 8, Bytes);
        std::memcpy(out + i, &even, sizeof(even));
        std::memcpy(out + kHalf + i, &odd, sizeof(odd));
    }
}

// Row i of `rows` from k elements: round(x / scale) with scale = max |x| / 127.
template <class T>
inline void quantize_row(const T* x, int64_t k, const CodedRows& rows, int64_t i) {
    VecF most{}, invalid{};
    for_each_vector<float>(k, [&](int64_t j, int64_t n) {
        const VecF v = load_n(x + j, n), size = v < VecF{} ? -v : v;
        most = most >= size ? most : size;
        invalid += v * 0.0f;  // NaN if v is, or infinite
    });
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = largest >= most[lane] ? largest : most[lane];
    const float scale = largest / 127 + sum_lanes<float>(invalid), inverse = largest > 0 ? 127 / largest : 0;
    rows.scale[i] = scale;
    int8_t* out = rows.codes + i * rows.stride;
    float* sums = rows.sums + i * rows.sums_stride;
    for (int64_t g = 0; g < rows.sums_stride; ++g) sums[g] = 0;
    int64_t group_end = rows.group;
    constexpr int64_t kUnit = CodedRows::kUnit, kPart = 16;  // columns; parts lie in one group each
    for (int64_t j = 0; j < rows.stride; j += kUnit, out += kUnit) {
        const int64_t count = larger(0, smaller(kUnit, k - j));
        int8_t codes[kUnit] = {};
        for (int64_t s = 0; s < count; s += kPart) {
            VecI32 sum{};
            for_each_vector<float>(smaller(kPart, count - s), [&](int64_t i, int64_t n) {
                VecF v = load_n(x + j + s + i, n) * inverse;
                __asm__("" : "+x"(v));  // the product is a float32 before it is an integer: no fused multiply-add
                const VecI32 integers = bit_cast<VecI32>(v + kRound) - kRoundBits;
                const auto bytes = __builtin_convertvector(integers, VecI8);
                std::memcpy(codes + s + i, &bytes, sizeof(bytes));
                sum += integers;
            });
            if (j + s >= group_end) {
                group_end += rows.group;
                ++sums;
            }
            *sums += sum_lanes<float>(to_floats(sum));
        }
        if (rows.pairs) {
            put_pairs(codes, out);
        } else {
            std::memcpy(out, codes, sizeof(codes));
        }
    }
}

}  // namespace kt::KT_ISA
