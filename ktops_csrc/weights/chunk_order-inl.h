#pragma once

#include <cstdint>
#include <utility>

#include "isa/chunk-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Copies a row of k elements in the order of chunks (split or not), with zeros up to a whole chunk.
template <class T>
inline void order(const T* x, int64_t k, bool split, float* out) {
    constexpr int L = kLanes<float>, N = kChunkVectors;
    constexpr auto lanes = std::make_integer_sequence<int, L>();
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
        VecF v[N];
        for (int64_t s = 0; s < N; ++s) {
            const int64_t n = smaller(L, k - i - s * L);
            v[s] = n > 0 ? load_n(x + i + s * L, n) : VecF{};
        }
        for (int s = 0; s < N; ++s) {
            const int pair = s % (N / 2) * 2;
            store(out + s * L, split ? split_lanes(v[pair], v[pair + 1], s / (N / 2), lanes) : v[s]);
        }
    }
}

}  // namespace kt::KT_ISA
