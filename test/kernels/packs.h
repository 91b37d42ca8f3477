// Kernels that move blocks of matrices: every element must arrive where it belongs, bit by bit.

#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/pack-inl.h"
#include "isa/zero_past_caches-inl.h"
#include "shape.h"

namespace suites {

using namespace kt;
using namespace kt::KT_ISA;

// The index of element k of column j in a panel.
template <class C>
int64_t in_panel(int64_t k, int64_t j) {
    return k / kPack<C> * kPack<C> * kPanelColumns + j * kPack<C> + k % kPack<C>;
}

template <class C>
bool same(C x, C y) {
    return std::memcmp(&x, &y, sizeof(C)) == 0;
}

// Panels of n columns, `stride` apart, must hold value(k, j), zeros up to kKMultiple and past column n, and no more.
template <class C, class F>
std::string check_panels(Output<C>& out, int64_t stride, int64_t n, int64_t kn, F value) {
    const int64_t elements = panel_elements<C>(kn);
    for (int64_t first = 0; first < n; first += kPanelColumns) {
        const int64_t at = first / kPanelColumns * stride;
        for (int64_t k = 0; k < elements / kPanelColumns; ++k) {
            for (int64_t j = 0; j < kPanelColumns; ++j) {
                const C expected = k < kn && first + j < n ? value(k, first + j) : C{};
                if (!same(out[at + in_panel<C>(k, j)], expected)) {
                    return "element " + std::to_string(k) + " of column " + std::to_string(first + j);
                }
            }
        }
        for (int64_t i = at + elements; i < smaller(at + stride, out.size()); ++i) {
            if (!out.untouched(i)) return "written between panels";
        }
    }
    return expect(out.guarded(), "written out of bounds");
}

struct transpose_16x16 {
    static std::string run(const Shape& shape) {
        const int64_t stride = shape.stride(64);
        Input<char> rows(15 * stride + 64);
        for (int64_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<char>(random_integer(-128, 127));
        Output<uint32_t> out(16 * 16);
        kt::KT_ISA::transpose_16x16(rows.data(), stride, out.data());
        for (int64_t n = 0; n < 16; ++n) {
            for (int64_t k = 0; k < 16; ++k) {
                if (std::memcmp(&out[16 * k + n], rows.data() + n * stride + 4 * k, 4)) return "wrong";
            }
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

struct zero_past_caches {
    static std::string run(const Shape& shape) {
        const int64_t n = shape.size("columns", 100, 4096), first = shape.size("first", 3, 16), last = 5;
        Output<char> out(first + n + last);
        kt::KT_ISA::zero_past_caches(out.data() + first, n);
        for (int64_t i = 0; i < out.size(); ++i) {
            const bool zero = i >= first && i < first + n;
            if (zero ? out[i] != 0 : !out.untouched(i)) return "byte " + std::to_string(i);
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

template <class T>
struct transpose_block {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t k = 64 / sizeof(T);
        Matrix<T> w(kPanelColumns, k, shape.stride(k));
        Output<C> out(k * kPanelColumns);
        kt::KT_ISA::transpose_block(w.data(), w.stride, out.data());
        for (int64_t i = 0; i < k * kPanelColumns; ++i) {
            const int64_t row = i % kPanelColumns, column = i / kPanelColumns;
            if (!same(out[in_panel<C>(column, row)], convert<C>(w.row(row)[column]))) return "wrong";
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

template <class T>
struct pack_nt {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        Matrix<T> w(n, k, shape.stride(k));
        Output<C> out(panel_elements<C>(k));
        kt::KT_ISA::pack_nt(w.data(), w.stride, n, k, out.data());
        return check_panels(out, out.size(), n, k, [&](int64_t i, int64_t j) { return convert<C>(w.row(j)[i]); });
    }
    static constexpr int64_t kUnit = 64 / sizeof(T);
};

template <class T>
struct pack_nt_scaled {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        using S = std::conditional_t<std::is_same_v<C, bfloat16>, float, T>;
        constexpr int64_t kUnit = 64 / sizeof(C);
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        const Acc<C> factor = static_cast<Acc<C>>(0.3);
        Matrix<S> w(n, k, shape.stride(k));
        Output<C> out(panel_elements<C>(k));
        kt::KT_ISA::pack_nt_scaled(w.data(), w.stride, n, k, out.data(), factor);
        return check_panels(out, out.size(), n, k,
                            [&](int64_t i, int64_t j) { return from_float<C>(w.at(j, i) * factor); });
    }
};

// Rows of a matrix in another order.
template <class T>
struct ShuffledRows {
    std::vector<int32_t> index;
    Rows<T> rows;

    explicit ShuffledRows(Matrix<T>& matrix) {
        for (int64_t i = 0; i < matrix.rows; ++i) index.push_back(static_cast<int32_t>(matrix.rows - 1 - i));
        rows = {matrix.data(), matrix.stride, index.data()};
    }
};

template <class T>
struct pack_nn {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t kUnit = 8, kGap = 5;
        const int64_t n = shape.size("columns", 40, 40), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        const int64_t column = shape.is("column", "3") ? 3 : 0;
        Matrix<T> w(k, column + n, shape.stride(column + n));
        const ShuffledRows<T> rows(w);
        const int64_t elements = panel_elements<C>(k), stride = elements + kGap;
        Output<C> out(ceil_div(n, kPanelColumns) * stride - kGap);
        kt::KT_ISA::pack_nn(rows.rows, column, n, k, out.data(), stride);
        return check_panels(out, stride, n, k,
                            [&](int64_t i, int64_t j) { return convert<C>(rows.rows.row(i)[column + j]); });
    }
};

template <class T>
struct pack_nn_scaled {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t kUnit = 8;
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        Matrix<T> w(k, n, shape.stride(n));
        const ShuffledRows<T> rows(w);
        const auto factor = [](int64_t i) { return static_cast<Acc<C>>(0.1) * static_cast<Acc<C>>(i + 1); };
        const int64_t end = round_up(k, kKMultiple<C>), middle = end / 2 / kPack<C> * kPack<C>;
        Output<C> out(panel_elements<C>(k));
        kt::KT_ISA::pack_nn_scaled(rows.rows, 0, n, k, out.data(), factor, middle, end);
        for (int64_t i = 0; i < middle * kPanelColumns; ++i) {
            if (!out.untouched(i)) return "written before its part";
        }
        kt::KT_ISA::pack_nn_scaled(rows.rows, 0, n, k, out.data(), factor, 0, middle);
        return check_panels(out, out.size(), n, k, [&](int64_t i, int64_t j) {
            return from_float<C>(static_cast<Acc<C>>(to_float(rows.rows.row(i)[j])) * factor(i));
        });
    }
};

template <class T>
struct pack_columns {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t kUnit = 64 / sizeof(C);
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        Matrix<C> w(n, k, shape.stride(k));
        Output<C> out(panel_elements<C>(k));
        kt::KT_ISA::pack_columns(n, k, out.data(), [&](int64_t j, int64_t at, int64_t count, C* to) {
            std::memcpy(static_cast<void*>(to), w.row(j) + at, static_cast<size_t>(count) * sizeof(C));
        });
        return check_panels(out, out.size(), n, k, [&](int64_t i, int64_t j) { return w.row(j)[i]; });
    }
};

template <class T>
struct pack_rows {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t kUnit = 64 / sizeof(C), kFirst = 2;
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 2 * kUnit, 0, kUnit);
        Matrix<C> w(kFirst + n, k, shape.stride(k));
        const ShuffledRows<C> rows(w);
        Output<C> out(panel_elements<C>(k));
        kt::KT_ISA::pack_rows(rows.rows, kFirst, n, k, out.data());
        return check_panels(out, out.size(), n, k, [&](int64_t i, int64_t j) { return rows.rows.row(kFirst + j)[i]; });
    }
};

template <class T>
struct stage_rows {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        const int64_t m = shape.size("m", 3, 6), k = shape.size("k", 2 * kKMultiple<C> + 3, 0, kKMultiple<C>);
        Matrix<T> x(m, k, shape.stride(k));
        std::vector<const T*> rows;
        for (int64_t i = 0; i < m; ++i) rows.push_back(x.row(i));
        const int64_t stride = staged_row_stride<C>(k), padded = round_up(k, kKMultiple<C>);
        Output<C> out((m - 1) * stride + padded);
        std::vector<const C*> a(m);
        kt::KT_ISA::stage_rows(rows.data(), m, k, out.data(), a.data());
        for (int64_t i = 0; i < m; ++i) {
            if (a[i] != out.data() + i * stride) return "pointer " + std::to_string(i);
            for (int64_t j = 0; j < padded; ++j) {
                if (!same(a[i][j], j < k ? convert<C>(x.row(i)[j]) : C{})) return "row " + std::to_string(i);
            }
            for (int64_t j = i * stride + padded; j < smaller((i + 1) * stride, out.size()); ++j) {
                if (!out.untouched(j)) return "written between rows";
            }
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

template <class T>
struct point_into_panels {
    static std::string run(const Shape& shape) {
        using C = Compute<T>;
        constexpr int64_t kPanels = 3, kStride = 4 * kPack<C> * kPanelColumns + 8;
        const int64_t m = shape.size("m", 6, 32), first = shape.is("first", "13") ? 13 : 0;
        Matrix<C> panels(1, kPanels * kStride, kPanels * kStride);
        std::vector<const C*> a(m);
        kt::KT_ISA::point_into_panels(panels.data(), kStride, first, m, a.data());
        for (int64_t i = 0; i < m; ++i) {
            const int64_t row = first + i, panel = row / kPanelColumns * kStride;
            if (a[i] != &panels[panel + in_panel<C>(0, row % kPanelColumns)]) return "row " + std::to_string(row);
        }
        return "ok";
    }
};

}  // namespace suites
