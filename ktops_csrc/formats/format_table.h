#pragma once

// What the kernels of a layer need of a format, without its type: one table of functions for each format and ISA.

#include <type_traits>

#include "core/workspace.h"
#include "formats/format.h"

namespace kt {

// Numbers of n groups, in whole vectors.
constexpr int64_t group_room(int64_t n) { return round_up(n, 16); }

// Rows of activations as codes, zeros up to whole units: in order, or of every unit the even columns and then the odd
// ones.
struct CodedRows {
    static constexpr int64_t kUnit = 128, kSumsMultiple = 16;

    int8_t* codes = nullptr;
    int64_t stride = 0;
    float* scale = nullptr;  // of every row
    float* sums = nullptr;   // of every row and group: of its codes; zeros up to sums_stride
    int64_t sums_stride = 0;
    int64_t group = 0;
    bool pairs = false;

    const int8_t* row(int64_t i) const { return codes + i * stride; }
    const float* row_sums(int64_t i) const { return sums + i * sums_stride; }

    static size_t bytes(int64_t rows, const WeightTensor& w) {
        return Workspace::padded<int8_t>(rows * round_up(w.columns, kUnit)) + Workspace::padded<float>(rows) +
               Workspace::padded<float>(rows * groups_stride(w.columns, code_group(w)));
    }
    static CodedRows take(Workspace& workspace, int64_t rows, const WeightTensor& w, bool pairs) {
        CodedRows out;
        out.group = code_group(w);
        out.pairs = pairs;
        out.stride = round_up(w.columns, kUnit);
        out.sums_stride = groups_stride(w.columns, out.group);
        out.codes = workspace.take<int8_t>(rows * out.stride);
        out.scale = workspace.take<float>(rows);
        out.sums = workspace.take<float>(rows * out.sums_stride);
        return out;
    }

private:
    static int64_t groups_stride(int64_t columns, int64_t group) {
        // A piece of a row may begin with any of its groups, and takes kSumsMultiple at a time.
        return round_up(ceil_div(columns, larger(1, smaller(group, columns))), kSumsMultiple) + kSumsMultiple;
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
    int64_t few_rows;  // that dots take at most
    bool split;        // the order of a chunk

    // Of integer formats: functions of CodeKernels and CodeRows.
    void (*code_dots)(const WeightTensor&, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                      int64_t m, float* c, int64_t ldc) = nullptr;
    void (*code_rows)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                      int64_t stride) = nullptr;
    void (*code_panel)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                       int64_t ahead) = nullptr;
    void (*code_scales)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t first, int64_t count,
                        float* scale, float* min, int64_t apart) = nullptr;
    int zero_code = 0;
    int64_t code_columns = 0;               // of a unit
    bool pairs = false, code_mins = false;  // the order of codes; whether groups have a zero point of their own
};

}  // namespace kt
