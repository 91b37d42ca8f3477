#pragma once

// What products with few rows share, with floats or with codes: scales and zero points of the groups of a row, pieces
// of rows, and sums.

#include "formats/format.h"
#include "isa/chunk-inl.h"
#include "isa/direct-inl.h"

namespace kt::KT_ISA {

// Columns whose scales are read at once, a multiple of every block.
constexpr int64_t kPiece = 4096;
constexpr int64_t kPieceGroups = kPiece / kChunk;

// n numbers of a row's groups as float32.
inline void load_groups(const GroupValues& values, int64_t e, int64_t row, int64_t first, int64_t n, float* out) {
    const int64_t offset = e * values.expert_stride + row / values.row_block * values.row_stride + first;
    const auto* bytes = static_cast<const uint8_t*>(values.data) + offset;
    const auto* halves = static_cast<const uint16_t*>(values.data) + offset;
    const auto vectors = [&](const auto* p) {
        for_each_vector<float>(n, [&](int64_t i, int64_t count) { store_n(out + i, load_n(p + i, count), count); });
    };
    switch (values.type) {
        case GroupValues::Type::kFloat32:
            return vectors(static_cast<const float*>(values.data) + offset);
        case GroupValues::Type::kBFloat16:
            return vectors(static_cast<const bfloat16*>(values.data) + offset);
        case GroupValues::Type::kFloat16:
            for (int64_t i = 0; i < n; ++i) out[i] = float16(halves + i);
            return;
        case GroupValues::Type::kUInt8:
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(bytes[i]);
            return;
        case GroupValues::Type::kExponent:
            for (int64_t i = 0; i < n; ++i) out[i] = power_of_two(bytes[i]);
            return;
    }
}

// f(first, end) for the parts of [first, end) that lie in one piece each.
template <class F>
inline __attribute__((always_inline)) void for_each_piece(int64_t first, int64_t end, F f) {
    for (int64_t next; first < end; first = next) {
        next = smaller(end, (first / kPiece + 1) * kPiece);
        f(first, next);
    }
}

// Bytes between a code and the one that is read ahead when it is used.
constexpr int64_t kReadAhead = 1024;

// Rows of activations that share a read of codes, at most; f(1, 2 or 4 as a constant) for m of them.
constexpr int kFewRows = KT_VECTOR_BYTES == 64 ? 4 : KT_VECTOR_BYTES == 32 ? 2 : 1;
template <class F>
inline void with_few_rows(int64_t m, F f) {
    if constexpr (kFewRows > 2) {
        if (m > 2) return f(std::integral_constant<int, 4>());
    }
    if constexpr (kFewRows > 1) {
        if (m > 1) return f(std::integral_constant<int, 2>());
    }
    f(std::integral_constant<int, 1>());
}

// put(i, j, sum) of the first m rows of sums, j being the rows of W.
template <int M, class Put>
inline void put_dots(const VecF (&sums)[M][kDotRows], int64_t m, const DotRows& rows, Put put) {
    for (int64_t i = 0; i < m; ++i) {
        float out[kDotRows];
        put_sums<float, kDotRows>(sums[i], out);
        for (int64_t j = 0; j < rows.count; ++j) put(i, rows.first + j * rows.apart, out[j]);
    }
}

}  // namespace kt::KT_ISA
