#pragma once

// A call of kt::quantize, for the kernels.

#include <cstdint>

#include "core/views.h"
#include "parallel/schedule.h"
#include "weights/format.h"

namespace kt {

enum class Method : uint8_t { kRtn, kMse, kHqq };

struct QuantizeProblem {
    StridedTensor weight;  // [experts, rows, columns]
    int64_t experts = 0, rows = 0, columns = 0;
    FormatId format = FormatId::dense;
    Method method = Method::kRtn;
    int64_t group = 0;      // columns that share a scale; all columns if a row has one scale
    bool row_scale = true;  // true if the group is the row, whose scale is float32; else it is bfloat16

    // Contiguous results: the codes; for every row, or block of rows, and group the scale, and the zero point, which
    // is uint8 for rtn, else float16.
    uint8_t* codes = nullptr;
    int64_t row_bytes = 0;
    void *scale = nullptr, *zero = nullptr;

    int num_threads = 1;
    Launch launch = nullptr;

    int64_t groups() const { return ceil_div(columns, group); }
};

}  // namespace kt
