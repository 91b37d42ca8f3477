#pragma once

// Types of one register, in the compiler's vector extension, and functions that need instructions of an ISA or, without
// those, plain C++. Every ISA includes one of simd_generic-inl.h, simd_avx2-inl.h and simd_avx512-inl.h, which define
// them. All other code with vectors is the same source for all ISAs (vec-inl.h, ...).

#include <cstdint>
#include <cstring>

#include "core/bfloat16.h"

namespace kt::KT_ISA {

template <class A>
struct VecOf {
    typedef A type __attribute__((vector_size(Isa::kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
using VecF = Vec<float>;

template <class A>
constexpr int kLanes = Isa::kVectorBytes / static_cast<int>(sizeof(A));

typedef uint32_t VecU32 __attribute__((vector_size(Isa::kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(Isa::kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(Isa::kVectorBytes / 2)));  // as many lanes as VecU32

typedef int8_t VecI8 __attribute__((vector_size(Isa::kVectorBytes / 4)));  // as many lanes as VecI32
typedef uint8_t VecU8 __attribute__((vector_size(Isa::kVectorBytes / 4)));

// Chunks: 32 consecutive weights of a row (chunk-inl.h). Bytes32: a byte per weight.
constexpr int64_t kChunk = 32;
constexpr int kChunkVectors = static_cast<int>(kChunk) / kLanes<float>;
typedef uint8_t Bytes32 __attribute__((vector_size(32)));

// Codes of weights, and their dot products, four codes per lane (dot4-inl.h).
constexpr int64_t kCodeBytes = Isa::kVectorBytes == 64 ? 64 : 32;
constexpr int kDotLanes = static_cast<int>(kCodeBytes / 4);
typedef uint8_t VecCodes __attribute__((vector_size(kCodeBytes)));
typedef int32_t VecDots __attribute__((vector_size(kCodeBytes)));
typedef float VecDotsF __attribute__((vector_size(kCodeBytes)));
typedef int16_t VecWords __attribute__((vector_size(kCodeBytes)));

template <class V, class P>
inline V load_bits(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

// Loads the first n lanes of a Vec, through memory; the others are zeros. And stores the first n.
template <class A>
inline Vec<A> load_lanes(const A* p, int64_t n) {
    A lanes[kLanes<A>] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(A));
    return load_bits<Vec<A>>(lanes);
}
template <class A>
inline void store_lanes(A* p, Vec<A> v, int64_t n) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof(v));
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(A));
}

// 0, 1, 2, ...
inline VecI32 lane_indices() {
    VecI32 lanes;
    for (int i = 0; i < kLanes<float>; ++i) lanes[i] = i;
    return lanes;
}

inline VecF to_floats(VecI32 x) { return __builtin_convertvector(x, VecF); }

// Only the first n lanes, 0 <= n <= lanes; those that are not read are zeros.
VecU8 load_partial(const uint8_t* p, int64_t n);
VecU16 load_partial(const uint16_t* p, int64_t n);
VecF load_partial(const float* p, int64_t n);
void store_partial(float* p, VecF v, int64_t n);

// Stores a register past the caches if it is a whole line; p is aligned to a line. Other threads see it after the
// thread's next locked instruction, such as the one that counts a finished task.
void store_past_caches(float* p, VecF v);

// 16 x 16 dwords: out[16 * k + n] = row n, dword k. Rows are `stride` bytes apart.
void transpose_16x16(const char* rows, int64_t stride, uint32_t* out);

// Zero-extends 16 bits to 32.
VecU32 widen(VecU16 x);

// Extend one byte per lane of float32.
VecI32 widen_unsigned(const uint8_t* p);
VecI32 widen_signed(const uint8_t* p);

// Convert IEEE binary16 to float32, exactly: the number at p, or every lane.
float float16_at(const void* p);
VecF from_float16(VecU16 x);

// Rounds to IEEE binary16, to nearest even; a NaN stays a (quiet) NaN.
VecU16 to_float16(VecF x);

// Converts signed bytes to a chunk.
void unpack(Bytes32 x, VecF* v);

// Converts E4M3 numbers to a chunk, times 2^-8: as binary16 they have the same mantissa and another bias, so subnormal
// numbers need no special case. 0x7f and 0xff are NaN.
constexpr float kFp8Factor = 256;
void unpack_fp8(const uint8_t* p, VecF* v);

// table[index & 15] of every lane.
VecF lookup(const float* table, VecI32 index);

// table[index] of every byte, index < 16.
VecCodes lookup_codes(const uint8_t* table, VecCodes index);

// Sums of the products of every two neighbors. multiply_bytes: a is unsigned, b signed, and each sum must fit in a
// word.
VecDots multiply_words(VecWords a, VecWords b);
VecWords multiply_bytes(VecCodes a, VecCodes b);

// Four numbers, repeated.
VecDotsF repeat_four(const float* p);

// kCodeBytes bytes: the 32 at p shifted right by `low` bits and, if kCodeBytes is 64, again by `high` bits. Bits of the
// next byte are shifted in from above.
VecCodes shifted_twice(const uint8_t* p, int low, int high);

// kCodeBytes bytes: the 32 at p and, if kCodeBytes is 64, the 32 at p + apart.
VecCodes load_parts(const uint8_t* p, int64_t apart);

// The same for four-bit codes: the low halves of 16 bytes, then their high halves.
VecCodes nibble_parts(const uint8_t* p, int64_t apart);

}  // namespace kt::KT_ISA
