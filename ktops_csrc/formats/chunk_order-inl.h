#pragma once

#include "formats/format_table.h"
#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

// The one of n weights that comes at position j: first those of even index and then those of odd index, or in order.
inline int64_t index_at(int64_t j, int64_t n, bool split) { return split ? j % (n / 2) * 2 + j / (n / 2) : j; }

// A row of k elements in the order of chunks (split or not), zeros up to a whole chunk.
template <class T>
inline void order(const T* x, int64_t k, bool split, float* out) {
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
        float part[kChunk] = {};
        const int64_t n = smaller(kChunk, k - i);
        for_each_vector<float>(n,
                               [&](int64_t j, int64_t count) { store_n(part + j, load_n(x + i + j, count), count); });
        for (int64_t j = 0; j < kChunk; ++j) out[j] = part[index_at(j, kChunk, split)];
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
    constexpr int64_t kUnit = CodedRows::kUnit, kPart = 16;  // columns; parts lie in one group each
    for (int64_t j = 0; j < rows.stride; j += kUnit, out += kUnit) {
        float values[kUnit] = {};
        const int64_t count = larger(0, smaller(kUnit, k - j));
        for_each_vector<float>(count,
                               [&](int64_t s, int64_t n) { store_n(values + s, load_n(x + j + s, n) * inverse, n); });
        int32_t integers[kUnit];
        for (int s = 0; s < kUnit; s += kLanes<float>) {
            const VecI32 rounded = bit_cast<VecI32>(load(values + s) + kRound) - kRoundBits;
            std::memcpy(integers + s, &rounded, sizeof(rounded));
        }
        for (int64_t s = 0; s < count; s += kPart) {
            int32_t sum = 0;
            for (int64_t p = 0; p < kPart; ++p) sum += integers[s + p];
            sums[(j + s) / rows.group] += static_cast<float>(sum);
        }
        for (int64_t s = 0; s < kUnit; ++s) out[s] = static_cast<int8_t>(integers[index_at(s, kUnit, rows.pairs)]);
    }
}

}  // namespace kt::KT_ISA
