#include "isa/sum_words.h"

#include <cstring>

namespace kt {

// Reads several pages side by side, as the direct kernels read rows of weights: a hardware prefetcher follows a stream
// only to the end of its page, so reading one page at a time leaves memory idle. Vectors of 16 bytes, which any x86-64
// has, are fast enough: memory is slower still.
uint64_t sum_words(const uint64_t* words, int64_t n) {
    typedef uint64_t Pair __attribute__((vector_size(16)));
    constexpr int kPages = 8;
    constexpr int64_t kPage = 4096 / 8, kLine = 64 / 8, kAhead = 1024 / 8;
    Pair sums[kPages] = {};
    int64_t i = 0;
    for (; i + kPages * kPage <= n; i += kPages * kPage) {
        for (int64_t s = 0; s < kPage; s += kLine) {
            const uint64_t* line = words + i + s;
            const uint64_t* ahead = line + kAhead + (s + kAhead < kPage ? 0 : (kPages - 1) * kPage);
#pragma GCC unroll 8
            for (int64_t page = 0; page < kPages; ++page) {
                __builtin_prefetch(ahead + page * kPage);
#pragma GCC unroll 4
                for (int64_t k = 0; k < kLine; k += 2) {
                    Pair pair;
                    std::memcpy(&pair, line + page * kPage + k, sizeof(pair));
                    sums[page] += pair;
                }
            }
        }
    }
    uint64_t sum = 0;
    for (; i < n; ++i) sum += words[i];
    for (const Pair& pair : sums) sum += pair[0] + pair[1];
    return sum;
}

}  // namespace kt
