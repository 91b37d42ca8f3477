#pragma once

#include "formats/format_table.h"
#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

// The weight of a chunk that comes at position j.
inline int64_t in_chunk(int64_t j, bool split) { return split ? j % (kChunk / 2) * 2 + j / (kChunk / 2) : j; }

// A row of k elements in the order of chunks (split or not), zeros up to a whole chunk.
template <class T>
inline void order(const T* x, int64_t k, bool split, float* out) {
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
        float part[kChunk] = {};
        const int64_t n = smaller(kChunk, k - i);
        for_each_vector<float>(n,
                               [&](int64_t j, int64_t count) { store_n(part + j, load_n(x + i + j, count), count); });
        for (int64_t j = 0; j < kChunk; ++j) out[j] = part[in_chunk(j, split)];
    }
}

// Row i of `rows` from k elements: round(x / scale) with scale = max |x| / 127.
template <class T>
inline void quantize_row(const T* x, int64_t k, int64_t group, bool split, const CodedRows& rows, int64_t i) {
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
    for (int64_t j = 0; j < rows.stride; j += kChunk, out += kChunk) {
        float values[kChunk] = {};
        const int64_t count = larger(0, smaller(kChunk, k - j));
        for_each_vector<float>(count,
                               [&](int64_t s, int64_t n) { store_n(values + s, load_n(x + j + s, n) * inverse, n); });
        int32_t integers[kChunk], sum = 0;
        for (int s = 0; s < kChunk; s += kLanes<float>) {
            const VecI32 rounded = bit_cast<VecI32>(load(values + s) + kRound) - kRoundBits;
            std::memcpy(integers + s, &rounded, sizeof(rounded));
        }
        for (int64_t s = 0; s < kChunk; ++s) sum += integers[s];
        for (int64_t s = 0; s < kChunk; ++s) {
            out[s] = static_cast<int8_t>(integers[in_chunk(s, split)]);
        }
        if (j < k) sums[j / group] += static_cast<float>(sum);
    }
}

}  // namespace kt::KT_ISA
