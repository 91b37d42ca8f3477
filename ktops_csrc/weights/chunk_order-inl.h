#pragma once

#include <cstdint>

#include "isa/chunk-inl.h"
#include "weights/format_table.h"

namespace kt::KT_ISA {

// Copies a row of k elements in the order of chunks (split or not), with zeros up to a whole chunk.
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

}  // namespace kt::KT_ISA
