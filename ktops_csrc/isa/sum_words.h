#pragma once

// Measures the peak memory bandwidth of one thread, for rooflines.

#include <cstdint>

namespace kt {

// Returns the sum of n words, modulo 2^64.
uint64_t sum_words(const uint64_t* words, int64_t n);

}  // namespace kt
