// Products with panels while the next ones are packed.

#pragma once

#include <cstdint>
#include <string>

#include "gemm.h"
#include "isa/pack_ahead_avx512-inl.h"

namespace suites {

using kt::KT_ISA::AheadSlabs;
using kt::KT_ISA::kAheadColumns;
using kt::KT_ISA::kPackedColumns;
using kt::KT_ISA::PackAhead;

// Packs a block, then another of the same shape while the first is multiplied, then multiplies that.
template <class Gemm>
struct AheadSuite {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", Gemm::kRows, Gemm::kRows), k = shape.size("k", 96, 0, Gemm::kStep);
        const int64_t usual = smaller(Gemm::kMostColumns, kPackedColumns + kAheadColumns);
        const int64_t columns = shape.size("columns", usual, Gemm::kMostColumns, kAheadColumns);
        const int64_t groups = columns / kAheadColumns, group = k * kAheadColumns + 32, ldc = shape.stride(columns);
        const bool adds = shape.is("adds", "1");
        Matrix<bfloat16> w(k, 2 * columns, shape.stride(2 * columns)), x(m, k, shape.stride(k));
        const auto bytes = [](const bfloat16* p) { return reinterpret_cast<const char*>(p); };
        PackAhead packing({AheadSlabs{bytes(w.row(0)), 2 * columns, 2, 1, nullptr}, 2 * w.stride, k, 256, 32});
        Output<bfloat16> panels[2] = {Output<bfloat16>(groups * group), Output<bfloat16>(groups * group)};
        const auto start = [&](int block, int64_t steps) {
            packing.start(packing.rows.slabs.slab(block), k, columns, reinterpret_cast<char*>(panels[block].data()),
                          2 * group, steps);
        };
        start(0, 1);
        Gemm::finish(packing);
        Output<bfloat16> tiles(round_up(m, 16) * k);
        const bfloat16* a[Gemm::kRows];
        for (int64_t i = 0; i < m; ++i) a[i] = x.row(i);
        if constexpr (Gemm::kStaged) {
            Gemm::stage(a, m, k, tiles.data());
            a[0] = tiles.data();
        }
        for (int block = 0; block < 2; ++block) {
            if (block == 0) start(1, columns / kAheadColumns);
            Product<float> product(m, columns, ldc, columns, m, adds);
            Sums sums(m, columns, ldc, product.c);
            for (int64_t g = 0; g < groups; g += Gemm::kGroups) {
                const int some = static_cast<int>(smaller(Gemm::kGroups, groups - g));
                Gemm::multiply(static_cast<int>(m), some, a, panels[block].data() + g * group, group, k, sums.at(g),
                               ldc, adds, packing);
            }
            Gemm::finish(packing);
            sums.put();
            const std::string result = product.check(
                k, [&](int64_t i, int64_t s) { return x.at(i, s); },
                [&](int64_t s, int64_t j) { return w.at(s, block * columns + j); });
            if (result != "ok") return "block " + std::to_string(block) + ": " + result;
            if (!panels[block].guarded() || !sums.guarded() || !tiles.guarded()) return "written out of bounds";
        }
        return expect(packing.at.ahead == nullptr || packing.ahead_slab < 2, "prefetches past the last slab");
    }

private:
    // Sums in C itself, or in tiles.
    class Sums {
    public:
        Sums(int64_t m, int64_t columns, int64_t ldc, Output<float>& c)
            : m_(m), columns_(columns), ldc_(ldc), c_(c), tiles_(Gemm::kSums ? round_up(m, 16) * columns : 0) {
            if constexpr (Gemm::kSums > 0) {
                each([&](float& tile, float& from) { tile = from; });
            }
        }
        float* at(int64_t group) {
            return (Gemm::kSums ? tiles_.data() : c_.data()) + Gemm::sums_at(0, group, m_, ldc_);
        }
        void put() {
            if constexpr (Gemm::kSums > 0) {
                Output<float> rows(m_ * columns_);
                Gemm::put_sums(tiles_.data(), m_, columns_, rows.data());
                for (int64_t i = 0; i < m_; ++i) {
                    for (int64_t j = 0; j < columns_; ++j) c_[i * ldc_ + j] = rows[i * columns_ + j];
                }
                guarded_ = rows.guarded();
            }
        }
        bool guarded() const { return guarded_ && tiles_.guarded(); }

    private:
        // Column 8 l + 4 h + t of a group is column 4 l + t of tile h.
        template <class F>
        void each(F f) {
            for (int64_t i = 0; i < m_; ++i) {
                for (int64_t j = 0; j < columns_; ++j) {
                    const int64_t tile = j % 8 / 4, column = j % kAheadColumns / 8 * 4 + j % 4;
                    const int64_t group = Gemm::sums_at(i, j / kAheadColumns, m_, ldc_);
                    f(tiles_[group + tile * 256 + i % 16 * 16 + column], c_[i * ldc_ + j]);
                }
            }
        }

        int64_t m_, columns_, ldc_;
        Output<float>& c_;
        Output<float> tiles_;
        bool guarded_ = true;
    };
};

template <class>
struct ahead : AheadSuite<kt::KT_ISA::AheadGemm> {};

}  // namespace suites
