// Decodes and multiplies weights in the format "toy" with the scalar kernels. argv: experts, rows, columns, group.
// stdin: codes, scales in float32, one row of activations in float32. stdout: the weights, then the product with that
// row.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dispatch/scalar.h"

#include "isa/narrow_generic-inl.h"
#include "isa/simd_generic-inl.h"
#include "weights/decode-inl.h"
#include "weights/weight-inl.h"

int main(int, char** argv) {
    const int64_t experts = atoll(argv[1]), rows = atoll(argv[2]), columns = atoll(argv[3]), group = atoll(argv[4]);
    const int64_t groups = kt::ceil_div(columns, group);
    std::vector<uint8_t> codes(experts * rows * columns);
    std::vector<float> scales(experts * rows * groups), x(columns), out(experts * rows * columns), c(rows);
    if (fread(codes.data(), 1, codes.size(), stdin) != codes.size()) return 2;
    if (fread(scales.data(), 4, scales.size(), stdin) != scales.size()) return 2;
    if (fread(x.data(), 4, x.size(), stdin) != x.size()) return 2;

    kt::WeightTensor weight;
    for (const kt::Format& format : kt::kFormats) {
        if (!strcmp(format.name, "toy")) weight.format = format.id;
    }
    if (weight.is_dense()) return 3;
    weight.codes = codes.data();
    weight.expert_bytes = rows * columns;
    weight.row_bytes = columns;
    weight.columns = columns;
    weight.group = group;
    weight.scale.data = scales.data();
    weight.scale.expert_stride = rows * groups;
    weight.scale.row_stride = groups;
    const kt::scalar::Weight<float> operand(weight);
    std::vector<float> ordered(kt::round_up(columns, kt::scalar::kChunk));
    operand.order_row(x.data(), ordered.data());
    const float* row = ordered.data();
    for (int64_t e = 0; e < experts; ++e) {
        kt::scalar::decode_rows(weight, e, 0, rows, out.data() + e * rows * columns);
    }
    operand.dots(experts - 1, 0, rows, &row, 1, c.data(), rows);
    fwrite(out.data(), 4, out.size(), stdout);
    fwrite(c.data(), 4, c.size(), stdout);
}
