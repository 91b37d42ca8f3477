#pragma once

// The fastest that one thread can read memory: what rooflines are drawn against.

#include <cstdint>

namespace kt {

// The sum of n words, modulo 2^64.
uint64_t sum_words(const uint64_t* words, int64_t n);

}  // namespace kt
