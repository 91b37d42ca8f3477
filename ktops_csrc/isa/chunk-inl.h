#pragma once

// Chunks: 32 consecutive weights of a row as float32 in registers, and what decoders make them from.
//
// The vectors of a chunk hold the weights one after the other; or, where codes share bytes in pairs, first those of
// even index and then those of odd index ("split").

#include "core/float16.h"
#include "isa/panel-inl.h"

namespace kt::KT_ISA {

constexpr int64_t kChunk = 32;
constexpr int kChunkVectors = static_cast<int>(kChunk) / kLanes<float>;
using VecF = Vec<float>;

inline float float16(const void* p) {
    const auto bits = read(static_cast<const uint16_t*>(p));
#if KT_VECTOR_BYTES >= 32
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#else
    return float16_to_float(bits);
#endif
}

// As many bytes as there are lanes of float32.
inline VecI32 widen_unsigned(const uint8_t* p) {
#if KT_VECTOR_BYTES == 64
    return (VecI32)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif KT_VECTOR_BYTES == 32
    return (VecI32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return VecI32{p[0], p[1], p[2], p[3]};
#endif
}
inline VecI32 widen_signed(const uint8_t* p) {
#if KT_VECTOR_BYTES == 64
    return (VecI32)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif KT_VECTOR_BYTES == 32
    return (VecI32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    const auto* s = reinterpret_cast<const int8_t*>(p);
    return VecI32{s[0], s[1], s[2], s[3]};
#endif
}
inline VecF to_floats(VecI32 x) { return __builtin_convertvector(x, VecF); }

// The bytes of a chunk, one for each weight, and of half a chunk.
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// Every byte divided by 2^n, n < 8.
inline Bytes32 shift_right(Bytes32 x, int64_t n) {
    typedef uint16_t Words __attribute__((vector_size(32)));
    const uint8_t mask = static_cast<uint8_t>(0xff >> n);
    return (Bytes32)((Words)x >> static_cast<int>(n)) & mask;
}

// Signed bytes as a chunk.
inline void unpack(Bytes32 x, VecF* v) {
#if KT_VECTOR_BYTES == 64
    v[0] = to_floats((VecI32)_mm512_cvtepi8_epi32(_mm256_castsi256_si128((__m256i)x)));
    v[1] = to_floats((VecI32)_mm512_cvtepi8_epi32(_mm256_extracti128_si256((__m256i)x, 1)));
#else
    uint8_t bytes[kChunk];
    std::memcpy(bytes, &x, sizeof(bytes));
    for (int i = 0; i < kChunkVectors; ++i) v[i] = to_floats(widen_signed(bytes + i * kLanes<float>));
#endif
}

// Halves of IEEE binary16, exactly.
inline VecF from_float16(VecU16 x) {
#if KT_VECTOR_BYTES == 64
    return (VecF)_mm512_cvtph_ps((__m256i)x);
#elif KT_VECTOR_BYTES == 32
    return (VecF)_mm256_cvtph_ps((__m128i)x);
#else
    VecF out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = float16_to_float(x[i]);
    return out;
#endif
}

// table[index & 15] of every lane.
inline VecF lookup(const float* table, VecI32 index) {
#if KT_VECTOR_BYTES == 64
    return (VecF)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif KT_VECTOR_BYTES == 32
    const __m256i i = (__m256i)index;
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return (VecF)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
    VecF out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = table[index[i] & 15];
    return out;
#endif
}

// A chunk of E4M3 numbers times 2^-8: as binary16 they have the same digits and another bias, so that subnormal ones
// need no case of their own. 0x7f and 0xff are NaN.
constexpr float kFp8Factor = 256;
inline void unpack_fp8(const uint8_t* p, VecF* v) {
#if KT_VECTOR_BYTES == 64
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i magnitude = _mm512_set1_epi16(0x7f),
                  sign_and_digits = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, magnitude), magnitude);
    const __m512i shifted = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 1);
    const __m512i bits =
        _mm512_mask_mov_epi16(_mm512_and_si512(shifted, sign_and_digits), nan, _mm512_set1_epi16(0x7e00));
    v[0] = (VecF)_mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    v[1] = (VecF)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
#elif KT_VECTOR_BYTES == 32
    for (int i = 0; i < kChunkVectors; i += 2) {
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
        const __m256i magnitude = _mm256_set1_epi16(0x7f);
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, magnitude), magnitude);
        const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 1);
        const __m256i bits = _mm256_blendv_epi8(
            _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))), _mm256_set1_epi16(0x7e00), nan);
        v[i] = (VecF)_mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        v[i + 1] = (VecF)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    }
#else
    float values[kChunk];
    for (int i = 0; i < kChunk; ++i) {
        const uint16_t nan = (p[i] & 0x7f) == 0x7f ? 0x7e00 : 0;
        values[i] = float16_to_float(static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7 | nan));
    }
    for (int i = 0; i < kChunkVectors; ++i) v[i] = load(values + i * kLanes<float>);
#endif
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

// 32 weights in their order.
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

template <bool kSplit>
inline void store_chunk(const VecF* v, double* out) {
    float values[kChunk];
    store_chunk<kSplit>(v, values);
    for (int64_t i = 0; i < kChunk; ++i) out[i] = values[i];
}

template <bool kSplit>
inline void store_chunk(const VecF* v, bfloat16* out) {
#ifdef KT_BFLOAT16_DOT
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    if constexpr (kSplit) {
        alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        both = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
    }
    _mm512_storeu_si512(out, both);
#else
    constexpr int L = kLanes<float>, N = kChunkVectors;
    for (int i = 0; i < (kSplit ? N / 2 : N); ++i) {
        if constexpr (kSplit) {
            const VecU32 pairs = round_to_bfloat16(v[i]) | round_to_bfloat16(v[N / 2 + i]) << 16;
            std::memcpy(static_cast<void*>(out + 2 * i * L), &pairs, sizeof(pairs));
        } else {
            store(out + i * L, v[i]);
        }
    }
#endif
}

}  // namespace kt::KT_ISA
