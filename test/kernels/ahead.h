// Products with panels while the next ones are packed.

#pragma once

#include <cstdint>
#include <string>

#include "gemm.h"
#include "isa/pack_ahead_avx512_bf16-inl.h"

namespace suites {

using kt::KT_ISA::AheadGemm;
using kt::KT_ISA::AheadSlabs;
using kt::KT_ISA::kAheadColumns;
using kt::KT_ISA::kAheadK;
using kt::KT_ISA::kAheadStep;
using kt::KT_ISA::PackAhead;

// Packs a block, then another of the same shape while the first is multiplied, then multiplies that.
template <class>
struct ahead {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", AheadGemm::kRows, AheadGemm::kRows), k = shape.size("k", 48, 0, kAheadK);
        const int64_t columns = shape.size("columns", kAheadStep, kAheadStep, kAheadColumns);
        const int64_t groups = columns / kAheadColumns, group = k * kAheadColumns + 32, ldc = shape.stride(columns);
        const bool adds = shape.is("adds", "1");
        Matrix<bfloat16> w(k, 2 * columns, shape.stride(2 * columns)), x(m, k, shape.stride(k));
        const auto bytes = [](const bfloat16* p) { return reinterpret_cast<const char*>(p); };
        PackAhead packing(AheadSlabs{bytes(w.row(0)), 2 * columns, 2, 1, nullptr}, 2 * w.stride, k);
        Output<bfloat16> panels[2] = {Output<bfloat16>(groups * group), Output<bfloat16>(groups * group)};
        const auto start = [&](int block, int64_t steps) {
            packing.start(packing.slabs.slab(block), k, columns, reinterpret_cast<char*>(panels[block].data()),
                          2 * group, steps);
        };
        start(0, 1);
        AheadGemm::finish(packing);
        const bfloat16* a[AheadGemm::kRows];
        for (int64_t i = 0; i < m; ++i) a[i] = x.row(i);
        for (int block = 0; block < 2; ++block) {
            if (block == 0) start(1, columns / kAheadColumns);
            Product<float> product(m, columns, ldc, columns, m, adds);
            for (int64_t g = 0; g < groups; g += AheadGemm::kGroups) {
                const int some = static_cast<int>(smaller(AheadGemm::kGroups, groups - g));
                AheadGemm::multiply(static_cast<int>(m), some, a, panels[block].data() + g * group, group, k,
                                    product.c.data() + g * kAheadColumns, ldc, adds, packing);
            }
            AheadGemm::finish(packing);
            const std::string result = product.check(
                k, [&](int64_t i, int64_t s) { return x.at(i, s); },
                [&](int64_t s, int64_t j) { return w.at(s, block * columns + j); });
            if (result != "ok") return "block " + std::to_string(block) + ": " + result;
            if (!panels[block].guarded()) return "packed out of bounds";
        }
        return expect(packing.ahead == nullptr || packing.ahead_slab < 2, "prefetches past the last slab");
    }
};

}  // namespace suites
