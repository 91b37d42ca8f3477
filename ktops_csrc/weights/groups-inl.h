#pragma once

// Shared by products with few rows, with floats or with codes: scales and zero points of the groups of a row, pieces of
// rows, and sums.

#include <cstdint>
#include <type_traits>

#include "isa/chunk-inl.h"
#include "isa/direct-inl.h"
#include "isa/dot4-inl.h"
#include "weights/format_table.h"

namespace kt::KT_ISA {

// Columns of a piece: part of a row whose scales are loaded at once. A multiple of every format's block.
constexpr int64_t kPiece = 4096;
constexpr int64_t kPieceGroups = kPiece / kChunk;

// Loads n numbers of a row's groups as float32, times `factor`, then zeros up to group_room(n). Stores whole vectors,
// because a vector load soon after narrower stores would have to wait for them.
inline void load_groups(const GroupValues& values, int64_t e, int64_t row, int64_t first, int64_t n, float* out,
                        float factor = 1) {
    const uint8_t* from = values.at(e, row) + first * values.element_bytes();
    constexpr int64_t L = kLanes<float>;
    const auto vectors = [&](auto load) {
        for_each_vector<float>(n, [&](int64_t i, int64_t count) { store(out + i, load(i, count) * factor); });
        for (int64_t i = round_up(n, L); i < group_room(n); i += L) store(out + i, VecF{});
    };
    const auto numbers = [&](auto* all) {
        vectors([&](int64_t i, int64_t count) { return load_partial(all + i, count); });
    };
    const auto bytes = [&](int64_t i, int64_t count) {
        const VecU8 x = load_partial(from + i, count);
        return widen_unsigned(reinterpret_cast<const uint8_t*>(&x));
    };
    switch (values.type) {
        case GroupValues::Type::kFloat32:
            return numbers(reinterpret_cast<const float*>(from));
        case GroupValues::Type::kBFloat16:
            return numbers(reinterpret_cast<const bfloat16*>(from));
        case GroupValues::Type::kFloat16:
            return numbers(reinterpret_cast<const float16*>(from));
        case GroupValues::Type::kUInt8:
            return vectors([&](int64_t i, int64_t count) { return to_floats(bytes(i, count)); });
        case GroupValues::Type::kExponent:
            return vectors([&](int64_t i, int64_t count) {
                const VecF powers = powers_of_two(bytes(i, count));  // of 0: subnormal, which is slow in products
                return (VecF)((VecI32)powers & (lane_indices() < static_cast<int32_t>(count)));
            });
    }
}

// Calls f(first, end) for the part of [first, end) in each piece.
template <class F>
inline __attribute__((always_inline)) void for_each_piece(int64_t first, int64_t end, F f) {
    for (int64_t next; first < end; first = next) {
        next = smaller(end, (first / kPiece + 1) * kPiece);
        f(first, next);
    }
}

// Bytes from a code in use to the one prefetched meanwhile.
constexpr int64_t kReadAhead = 1536;

// The order of n rows of codes: as streams, unless these would be shorter than a page. Streams that share a page are
// slower.
inline DotOrder streams(int64_t n, int64_t row_bytes) { return {n, n / kDotRows * row_bytes >= 4096}; }

// The distance in bytes from a code in use to the one to prefetch. A stream ends where the next one, already read,
// began; there, the rows after all the streams are prefetched instead.
inline int64_t read_ahead(const DotOrder& order, int64_t step, int64_t row_bytes) {
    const bool ends = order.apart > 1 && step >= order.apart - ceil_div(kReadAhead, row_bytes);
    return kReadAhead + (ends ? (kDotRows - 1) * order.apart * row_bytes : 0);
}

// Prefetches the scales and zero points of n rows, columns [column, column + count): a few lines in each of many
// places, which the CPU does not foresee. (GCC removes calls of functions that only prefetch.)
inline __attribute__((always_inline)) void prefetch_groups(const WeightTensor& w, int64_t e, int64_t row, int64_t n,
                                                           int64_t column, int64_t count) {
    const int64_t group = smaller(w.group, w.columns), begin = column / group, end = ceil_div(column + count, group);
    for (const GroupValues* values : {&w.scale, &w.zero}) {
        if (!values->data || values->row_block > 1) continue;  // a line serves many rows
        const int64_t bytes = values->element_bytes();
        for (int64_t i = row; i < row + n; ++i) {
            const uint8_t *first = values->at(e, i) + begin * bytes, *last = first + (end - begin) * bytes - 1;
            for (const uint8_t* p = first; p < last; p += 64) __builtin_prefetch(p);
            __builtin_prefetch(last);
        }
    }
}

// Prefetches those of the rows whose codes are being prefetched.
inline __attribute__((always_inline)) void prefetch_groups(const WeightTensor& w, int64_t e, int64_t row,
                                                           const DotOrder& order, int64_t step) {
    if (!w.columns) return;
    step += ceil_div(kReadAhead, w.row_bytes) + 1;
    if (step >= order.count) return;
    const DotRows rows = order.at(step);
    for (int64_t r = 0; r < rows.count; ++r) prefetch_groups(w, e, row + rows.row(r), 1, 0, w.columns);
}

// The most rows of activations that share a read of codes. with_few_rows calls f(1, 2 or 4, a constant) for m rows.
constexpr int kFewRows = Isa::kVectorBytes == 64 ? 4 : Isa::kVectorBytes == 32 ? 2 : 1;
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

// Calls put(i, j, sum) for the first m rows of sums and every row j of W.
template <int M, class Put>
inline void put_dots(const VecF (&sums)[M][kDotRows], int64_t m, const DotRows& rows, Put put) {
    for (int64_t i = 0; i < m; ++i) {
        float out[kDotRows];
        put_sums<float, kDotRows>(sums[i], out);
        for (int64_t j = 0; j < rows.count; ++j) put(i, rows.first + j * rows.apart, out[j]);
    }
}

}  // namespace kt::KT_ISA
