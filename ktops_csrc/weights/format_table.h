#pragma once

// The interface between formats and the kernels of a layer: a table of functions for each format and ISA.

#include <type_traits>

#include "core/workspace.h"
#include "weights/format.h"

namespace kt {

// The numbers of n groups, rounded up to whole vectors.
constexpr int64_t group_room(int64_t n) { return round_up(n, 16); }

// Rows of activations as codes, padded with zeros to whole units. The codes are in order or, with `pairs`, the even
// columns of every unit come before its odd columns. An activation is a code times the scale of its block. With two
// digits, it is the sum of two such products, in two rows of codes that have one scale each for all blocks.
struct CodedRows {
    static constexpr int64_t kUnit = 128, kBlock = 32, kSumsMultiple = 16;
    static constexpr int32_t kDigit = 128;  // the high digit's scale over the low one's

    int8_t* codes = nullptr;      // of row 0; after the codes of each row, at these offsets in bytes:
    int64_t stride = 0;           // bytes from row to row
    int64_t scales_at = 0;        // float: the scale of every block
    int64_t starts_at = 0;        // int32: for every part, -zero_code times the sum of its codes
    int64_t sums_at = 0;          // float: for every group, the sum of its activations; zeros up to num_sums
    int64_t joined_at = 0;        // int8: for every unit, 1 if its blocks share one scale
    int64_t columns = 0;          // rounded up to whole units
    int64_t group = 0, part = 0;  // columns; a part is a block, or a group if that is smaller
    int64_t num_sums = 0;
    int zero_code = 0;
    int digits = 1;
    bool pairs = false;

    const int8_t* row(int64_t i) const { return codes + i * stride; }
    float* row_scales(int64_t i) const { return reinterpret_cast<float*>(codes + i * stride + scales_at); }
    int32_t* row_starts(int64_t i) const { return reinterpret_cast<int32_t*>(codes + i * stride + starts_at); }
    // Blocks of a unit may share a scale if they belong to one group.
    bool joins() const { return group % kUnit == 0; }
    int8_t* row_joined(int64_t i) const { return codes + i * stride + joined_at; }
    float* row_sums(int64_t i) const { return reinterpret_cast<float*>(codes + i * stride + sums_at); }

    // Allocates memory for `rows` rows of activations.
    static CodedRows take(Workspace& workspace, int64_t rows, const WeightTensor& w, int digits, bool pairs,
                          int zero_code) {
        CodedRows out(w, digits);
        out.codes = workspace.take<int8_t>(rows * digits * out.stride);
        out.pairs = pairs;
        out.zero_code = zero_code;
        return out;
    }

    CodedRows() = default;

private:
    CodedRows(const WeightTensor& w, int digits)
        : columns(round_up(w.columns, kUnit)),
          group(code_group(w)),
          part(smaller(kBlock, group)),
          // a piece of a row may start with any of its groups, and reads kSumsMultiple at a time
          num_sums(round_up(ceil_div(w.columns, larger(1, smaller(group, w.columns))), kSumsMultiple) + kSumsMultiple),
          digits(digits) {
        scales_at = columns;
        sums_at = scales_at + columns / kBlock * 4;  // scales are read in whole vectors, so floats follow them
        starts_at = sums_at + num_sums * 4;
        joined_at = starts_at + columns / part * 4;
        stride = round_up(joined_at + columns / kUnit, 64);
    }
};

struct FormatTable {
    template <class T>
    using Rows = void (*)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out,
                          int64_t stride);
    Rows<float> rows_float;
    Rows<bfloat16> rows_bfloat16;
    void (*dots)(const WeightTensor&, int64_t e, int64_t row, int64_t n, const float* const* x, int64_t m, float* c,
                 int64_t ldc);
    int64_t few_rows;  // the most rows of dots()
    bool split;        // the order of a chunk (isa/chunk-inl.h)

    // For integer formats: functions of CodeKernels and CodeRows.
    void (*code_dots)(const WeightTensor&, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                      int64_t m, float* c, int64_t ldc) = nullptr;
    void (*code_rows)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                      int64_t stride) = nullptr;
    void (*code_panel)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                       int64_t ahead) = nullptr;
    void (*code_scales)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t first, int64_t count,
                        float* scale, float* min, int64_t apart) = nullptr;
    int zero_code = 0;
    int pairs_in_word = 0;                  // sums of two products that add up to a word (isa/dot4-inl.h)
    int64_t code_columns = 0;               // of a unit
    bool pairs = false, code_mins = false;  // the order of codes; groups have zero points of their own
};

}  // namespace kt
