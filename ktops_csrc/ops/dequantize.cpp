#include "dispatch/table.h"
#include "ops/weight_argument.h"

namespace kt::ops {

Tensor dequantize(Tensor weight, OptionalTensor scale, OptionalTensor zero, std::string weight_format,
                  int64_t group_size, int64_t columns) {
    const Checker check("kt::dequantize");
    check.shape("weight", weight, {{"num_experts"}, {"rows"}, {"row_elements"}});
    check.require(columns >= 0, "columns must not be negative, got ", columns);
    const int64_t E = weight.size(0), N = weight.size(1);
    const WeightNames names{"weight",     "scale",
                            "zero",       "weight_format",
                            "group_size", {"num_experts", E},
                            {"rows", N},  {"columns", columns}};
    const Format* format = find_format(check, names, weight_format);
    check.require(format, "weight_format must name a format, got 'dense'");
    const WeightTensor view = weight_argument(check, names, *format, group_size, weight, scale, zero);
    Tensor out = empty({E, N, columns}, ScalarType::Float);
    auto* data = static_cast<float*>(out.mutable_data_ptr());
    constexpr int64_t kRows = 16;  // per task
    const int64_t blocks = ceil_div(N, kRows);
    const auto decode = dispatch::current().decode_rows;
    torch::stable::parallel_for(0, E * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t e = i / blocks, row = i % blocks * kRows;
            decode(view, e, row, smaller(kRows, N - row), data + (e * N + row) * columns);
        }
    });
    return out;
}

}  // namespace kt::ops
