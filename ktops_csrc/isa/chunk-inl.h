#pragma once

// Chunks: 32 consecutive weights of a row as float32 in registers; and functions from which decoders are built.
//
// The vectors of a chunk hold the weights in order; or, if two codes share a byte, first those of even index and then
// those of odd index ("split").

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/bfloat16.h"
#include "isa/simd-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Every byte divided by 2^n, n < 8.
inline Bytes32 shift_right(Bytes32 x, int64_t n) {
    typedef uint16_t Words __attribute__((vector_size(32)));
    const uint8_t mask = static_cast<uint8_t>(0xff >> n);
    return (Bytes32)((Words)x >> static_cast<int>(n)) & mask;
}

// 2^(e - 127), E8M0 numbers: 0 is 2^-127, 255 is NaN.
inline VecF powers_of_two(VecI32 e) {
    const VecI32 smallest = VecI32{} + 0x400000, nan = VecI32{} + 0x7fc00000;
    return (VecF)(e == 0 ? smallest : e == 255 ? nan : e << 23);
}

template <int... Is>
inline void weave_pair(VecF even, VecF odd, float* out, std::integer_sequence<int, Is...>) {
    constexpr int L = kLanes<float>;
    store(out, __builtin_shufflevector(even, odd, (Is / 2 + Is % 2 * L)...));
    store(out + L, __builtin_shufflevector(even, odd, (L / 2 + Is / 2 + Is % 2 * L)...));
}

// Stores 32 weights in their order.
template <bool kSplit>
inline void store_chunk(const VecF* v, float* out) {
    constexpr int L = kLanes<float>, N = kChunkVectors;
    for (int i = 0; i < (kSplit ? N / 2 : N); ++i) {
        if constexpr (kSplit) {
            weave_pair(v[i], v[N / 2 + i], out + 2 * i * L, std::make_integer_sequence<int, L>());
        } else {
            store(out + i * L, v[i]);
        }
    }
}

// The same as float16 or float64, through memory.
template <bool kSplit, class T>
inline void store_chunk(const VecF* v, T* out) {
    float values[kChunk];
    store_chunk<kSplit>(v, values);
    for (int64_t i = 0; i < kChunk; ++i) out[i] = from_float<T>(values[i]);
}

// In narrow_generic-inl.h, or in narrow_avx512_bf16-inl.h for ISAs with an instruction for it.
template <bool kSplit>
void store_chunk(const VecF* v, bfloat16* out);

// Stores only weights [first, end) of the 32, from out[0] on.
template <bool kSplit, class T>
inline void store_part(const VecF* v, int64_t first, int64_t end, T* out) {
    T all[kChunk];
    store_chunk<kSplit>(v, all);
    std::memcpy(static_cast<void*>(out), all + first, static_cast<size_t>(end - first) * sizeof(T));
}

}  // namespace kt::KT_ISA
