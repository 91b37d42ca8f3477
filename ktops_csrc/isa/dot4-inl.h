#pragma once

// Integer dot products: unsigned codes of weights times signed codes of activations, four products per 32-bit lane.

#include <cstdint>
#include <cstring>

#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

constexpr int kAnyCode = 255;  // the largest a code can be

// How many sums of two products fit in a word when added up, with codes of weights up to max_code.
constexpr int pairs_in_word(int max_code) { return INT16_MAX / (2 * 128 * max_code); }

// sum + weights * x, four products per lane; no weight exceeds kMaxCode. In narrow_generic-inl.h, or in
// narrow_avx512_bf16-inl.h for ISAs with an instruction for it (Isa::kByteDot).
template <int kMaxCode>
VecDots dot4(VecDots sum, VecCodes weights, VecCodes x);

// sum + words, two per lane.
inline VecDots add_words(VecDots sum, VecWords words) { return sum + multiply_words(words, VecWords{} + 1); }

inline VecDotsF dots_to_floats(VecDots x) { return __builtin_convertvector(x, VecDotsF); }

// Folds x into one register, by adding any further registers to the first.
inline VecF in_one_register(VecDotsF x) {
    if constexpr (sizeof(VecDotsF) == sizeof(VecF)) {
        return bit_cast<VecF>(x);
    } else {
        VecF parts[sizeof(VecDotsF) / sizeof(VecF)];
        std::memcpy(parts, &x, sizeof(x));
        return parts[0] + parts[1];
    }
}

inline void split_nibbles(VecCodes bytes, VecCodes* low, VecCodes* high) {
    typedef uint16_t Words __attribute__((vector_size(kCodeBytes)));
    *low = bytes & 15;
    *high = (VecCodes)((Words)bytes >> 4) & 15;
}

// x << 4 in every byte, with bits of its neighbor in the lower half.
inline VecCodes raise_by_four(VecCodes x) { return (VecCodes)((VecWords)x << 4); }

// Four-bit codes as bytes: the low halves of kBytes bytes, then their high halves.
template <int64_t kBytes>
inline void nibble_codes(const uint8_t* p, VecCodes* out) {
    if constexpr (kBytes < kCodeBytes) {
        out[0] = shifted_twice(p, 0, 4) & 15;
    } else {
        constexpr int64_t n = kBytes / kCodeBytes;
        for (int64_t i = 0; i < n; ++i) split_nibbles(load_bits<VecCodes>(p + i * kCodeBytes), out + i, out + n + i);
    }
}

}  // namespace kt::KT_ISA
