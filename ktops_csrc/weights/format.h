#pragma once

// Weight formats for the operators' checks and the kernels: names, sizes, pointers.

#include "core/views.h"

namespace kt {

enum class Element : uint8_t { kBFloat16, kFloat16, kFloat32, kInt8, kUInt8, kFloat8 };
enum class Scales : uint8_t { kNone, kFloats, kExponents };

enum class FormatId : uint8_t {
#define KT_FORMAT(name, ...) name,
#include "formats/formats.def"
#undef KT_FORMAT
    dense
};

struct Format {
    const char* name;
    FormatId id;
    Element element;
    int64_t block, bytes;
    Scales scales;
    bool zeros;
    int64_t code_group;
};

constexpr Format kFormats[] = {
#define KT_FORMAT(name, type, element, block, bytes, scales, zeros, code_group) \
    {#name, FormatId::name, Element::element, block, bytes, Scales::scales, zeros, code_group},
#include "formats/formats.def"
#undef KT_FORMAT
};

// Columns that share a scale of Scales::kExponents.
constexpr int64_t kExponentGroup = 32;

// A tensor of scales or zero points [E, rows, groups]: a number per group of a row, or of `row_block` rows.
struct GroupValues {
    enum class Type : uint8_t { kFloat32, kBFloat16, kFloat16, kUInt8, kExponent };

    const void* data = nullptr;
    Type type = Type::kFloat32;
    int64_t expert_stride = 0, row_stride = 0;  // elements; groups are contiguous
    int64_t row_block = 1;

    int64_t element_bytes() const {
        return type == Type::kFloat32 ? 4 : type == Type::kBFloat16 || type == Type::kFloat16 ? 2 : 1;
    }
    // The number of a row's first group.
    const uint8_t* at(int64_t e, int64_t row) const {
        const int64_t element = e * expert_stride + row / row_block * row_stride;
        return static_cast<const uint8_t*>(data) + element * element_bytes();
    }
};

// A weight [E, rows, columns] in a format, as rows of bytes; or dense, then no other member is set.
struct WeightTensor {
    StridedTensor dense;
    FormatId format = FormatId::dense;
    const uint8_t* codes = nullptr;
    int64_t expert_bytes = 0, row_bytes = 0;  // strides
    int64_t columns = 0;
    int64_t group = 0;  // columns that share a scale; at least all of them if a row has one scale
    GroupValues scale, zero;

    bool is_dense() const { return format == FormatId::dense; }
    const uint8_t* row(int64_t e, int64_t i) const { return codes + e * expert_bytes + i * row_bytes; }
};

inline const Format& format_of(const WeightTensor& weight) { return kFormats[static_cast<int>(weight.format)]; }

// Columns that share a scale in products in int8.
inline int64_t code_group(const WeightTensor& weight) {
    const int64_t in_block = format_of(weight).code_group;
    return in_block > 1 ? in_block : weight.group;
}

}  // namespace kt
