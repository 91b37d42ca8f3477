#pragma once

// Scales and zero points of the groups of a row.

#include "formats/format.h"
#include "isa/chunk-inl.h"

namespace kt::KT_ISA {

// Columns whose scales are read at once, a multiple of every block.
constexpr int64_t kPiece = 4096;
constexpr int64_t kPieceGroups = kPiece / kChunk;

// n numbers of a row's groups as float32.
inline void load_groups(const GroupValues& values, int64_t e, int64_t row, int64_t first, int64_t n, float* out) {
    const int64_t offset = e * values.expert_stride + row / values.row_block * values.row_stride + first;
    const auto each = [&](auto at) {
        for (int64_t i = 0; i < n; ++i) out[i] = at(i);
    };
    switch (values.type) {
        case GroupValues::Type::kFloat32:
            return each([&](int64_t i) { return read(static_cast<const float*>(values.data) + offset + i); });
        case GroupValues::Type::kBFloat16:
            return each(
                [&](int64_t i) { return to_float(read(static_cast<const bfloat16*>(values.data) + offset + i)); });
        case GroupValues::Type::kFloat16:
            return each([&](int64_t i) { return float16(static_cast<const uint16_t*>(values.data) + offset + i); });
        case GroupValues::Type::kUInt8:
            return each(
                [&](int64_t i) { return static_cast<float>(static_cast<const uint8_t*>(values.data)[offset + i]); });
        case GroupValues::Type::kExponent:
            return each([&](int64_t i) { return power_of_two(static_cast<const uint8_t*>(values.data)[offset + i]); });
    }
}

// f(first, end) for the parts of [first, end) that lie in one piece each.
template <class F>
inline void for_each_piece(int64_t first, int64_t end, F f) {
    for (int64_t next; first < end; first = next) {
        next = smaller(end, (first / kPiece + 1) * kPiece);
        f(first, next);
    }
}

}  // namespace kt::KT_ISA
