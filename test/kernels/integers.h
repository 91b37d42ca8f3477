// The kernel that multiplies panels of codes: exact sums, and their scales.

#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "isa/micro_dots-inl.h"
#include "shape.h"

namespace suites {

class micro_dots {
    static constexpr int64_t kBlock = 32, kUnit = 128, kHalf = 16;

public:
    static std::string run(const Shape& shape) {
        for (int panels = 1; panels <= MicroDots::kPanels; ++panels) {
            const std::string result = micro_dots(shape, panels).check();
            if (result != "ok") return std::to_string(panels) + " panels: " + result;
        }
        return "ok";
    }

private:
    micro_dots(const Shape& shape, int panels)
        : m(shape.size("m", MicroDots::kRows, MicroDots::kRows)),
          n(panels * kPanelColumns),
          blocks(shape.size("blocks", 9, 0)),
          group(shape.size("group", 128, 0)),
          part(smaller(group, kBlock)),
          max_code(shape.size("code", 255, 0)),
          k(round_up(blocks * kBlock, kUnit)),
          // half of the first group is before the panels
          first_blocks(shape.is("begins", "0") ? larger(group / 2 / kBlock, 1) : larger(group / kBlock, 1)),
          groups(group < kBlock ? blocks * kBlock / group
                                : 1 + ceil_div(larger(blocks - first_blocks, 0), group / kBlock)),
          scales_at(k),
          starts_at(scales_at + k / kBlock * 4),
          sums_at(starts_at + k / part * 4),
          joined_at(sums_at + groups * 4),
          row_bytes(joined_at + k / kUnit),
          w_stride(shape.stride(n)),
          b_stride(k * kPanelColumns + shape.stride(0)),
          ldc(shape.stride(n)),
          pairs(shape.is("pairs", "1")),
          joins(shape.is("joins", "1")),
          mins(group >= kBlock && !shape.is("mins", "0")),
          begins(!shape.is("begins", "0")),
          adds(shape.is("adds", "1")),
          b((panels - 1) * b_stride + k * kPanelColumns),
          w((groups - 1) * w_stride + n),
          w_mins((groups - 1) * w_stride + n),
          c((m - 1) * ldc + n) {
        // Columns in turns: any codes, and the largest ones.
        for (int64_t i = 0; i < b.size(); ++i) {
            b[i] = static_cast<uint8_t>(i / 4 % 2 ? max_code : random_integer(0, max_code));
        }
        for (int64_t i = 0; i < w.size(); ++i) w[i] = number(), w_mins[i] = number();
        for (int64_t i = 0; i < m; ++i) make_row();
        for (int64_t i = 0; adds && i < m * n; ++i) c[i / n * ldc + i % n] = static_cast<float>(i % 7 - 3);
    }

    static float number() { return static_cast<float>(random_integer(-100, 100)) / 64; }

    // Makes a row: codes in `blocks` blocks, then zeros. Blocks in turns: any codes, the largest, the least. If
    // `joins`, the blocks of a unit share one scale.
    void make_row() {
        rows.push_back(std::make_unique<Input<int8_t>>(row_bytes));
        int8_t* x = rows.back()->data();
        std::memset(x, 0, static_cast<size_t>(row_bytes));
        const auto row = static_cast<int64_t>(a.size());
        a.push_back(x);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t kind = (row + block) % 3;
            for (int64_t i = 0; i < kBlock; ++i) {
                const int64_t code = kind == 0 ? random_integer(-127, 127) : kind == 1 ? 127 : -128;
                x[code_index(block, i)] = static_cast<int8_t>(code);
            }
            const bool first = block % (kUnit / kBlock) == 0;
            put(x, scales_at, block, joins && !first ? scale(x, block - 1) : number());
        }
        for (int64_t p = 0; p < blocks * kBlock / part; ++p) {
            put(x, starts_at, p, static_cast<int32_t>(random_integer(-9999, 9999)));
        }
        for (int64_t g = 0; g < groups; ++g) put(x, sums_at, g, number());
        for (int64_t u = 0; u < k / kUnit; ++u) x[joined_at + u] = joins && u % 2 == 0;
    }
    template <class N>
    static void put(int8_t* row, int64_t at, int64_t i, N value) {
        std::memcpy(row + at + i * static_cast<int64_t>(sizeof(N)), &value, sizeof(N));
    }
    float scale(const int8_t* row, int64_t block) const {
        return read(reinterpret_cast<const float*>(row + scales_at) + block);
    }

    // The index of code i of a block in a row and in panels.
    int64_t code_index(int64_t block, int64_t i) const {
        if (!pairs) return block * kBlock + i;
        return block / 4 * kUnit + i / kHalf * (kUnit / 2) + block % 4 * kHalf + i % kHalf;
    }
    int64_t group_of(int64_t p) const {
        if (group <= kBlock) return p;
        return p < first_blocks ? 0 : 1 + (p - first_blocks) / (group / kBlock);
    }

    std::string check() {
        CodeArguments g{static_cast<int>(m),
                        static_cast<int>(n / kPanelColumns),
                        a.data(),
                        scales_at,
                        starts_at,
                        sums_at,
                        joined_at,
                        joins,
                        b.data(),
                        b_stride,
                        pairs_in_word(static_cast<int>(max_code)),
                        pairs,
                        blocks,
                        group,
                        first_blocks,
                        w.data(),
                        mins ? w_mins.data() : nullptr,
                        w_stride,
                        begins,
                        adds,
                        c.data(),
                        ldc,
                        b.data(),
                        0};
        MicroDots::multiply(g);
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                if (const std::string result = check(i, j); result != "ok") return result;
            }
            for (int64_t j = n; j < ldc && i + 1 < m; ++j) {
                if (!c.untouched(i * ldc + j)) return "written between rows of C";
            }
        }
        return expect(c.guarded(), "written out of bounds of C");
    }

    std::string check(int64_t i, int64_t j) {
        double sum = 0, magnitude = 0;
        const auto add = [&](double term) { sum += term, magnitude += std::fabs(term); };
        if (adds) add(static_cast<double>((i * n + j) % 7 - 3));
        const int64_t parts = blocks * kBlock / part;
        for (int64_t p = 0; p < parts; ++p) {
            int64_t exact = read(reinterpret_cast<const int32_t*>(a[i] + starts_at) + p);
            for (int64_t s = p * part; s < (p + 1) * part; ++s) {
                const int64_t at = code_index(s / kBlock, s % kBlock);
                const uint8_t code = b[j / kPanelColumns * b_stride + at / 4 * 64 + j % kPanelColumns * 4 + at % 4];
                exact += int64_t{code} * a[i][at];
            }
            add(static_cast<double>(exact) * scale(a[i], p * part / kBlock) * w[group_of(p) * w_stride + j]);
        }
        for (int64_t q = begins || group <= kBlock ? 0 : 1; mins && q < groups; ++q) {
            add(-static_cast<double>(w_mins[q * w_stride + j]) *
                read(reinterpret_cast<const float*>(a[i] + sums_at) + q));
        }
        // three roundings per part, two per group, and one for C
        const double error = std::fabs(c[i * ldc + j] - sum),
                     bound = error_bound<float>(3 * parts + 2 * groups, magnitude);
        return error <= bound
                   ? "ok"
                   : "C[" + std::to_string(i) + "][" + std::to_string(j) + "] is off by " + std::to_string(error);
    }

    int64_t m, n, blocks, group, part, max_code, k, first_blocks, groups;
    int64_t scales_at, starts_at, sums_at, joined_at, row_bytes, w_stride, b_stride, ldc;
    bool pairs, joins, mins, begins, adds;
    Input<uint8_t> b;
    Input<float> w, w_mins;
    Output<float> c;
    std::vector<std::unique_ptr<Input<int8_t>>> rows;
    std::vector<const int8_t*> a;
};

}  // namespace suites
