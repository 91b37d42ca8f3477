// Kernels that multiply floating-point numbers: every element of C is within the bound of its rounding errors.

#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "isa/direct-inl.h"
#include "packs.h"

namespace suites {

// C of a product: m rows of n columns. A kernel may write `written` rows of `room` columns. A term is rounded once, and
// `roundings` more times.
template <class A>
class Product {
public:
    Product(int64_t m, int64_t n, int64_t ldc, int64_t room, int64_t written, bool adds, int64_t roundings = 0)
        : c((written - 1) * ldc + room),
          m_(m),
          n_(n),
          ldc_(ldc),
          room_(room),
          written_(written),
          adds_(adds),
          roundings_(roundings) {
        if (!adds) return;
        for (int64_t i = 0; i < written; ++i) {
            for (int64_t j = 0; j < room; ++j) c[i * ldc + j] = value(i, j);
        }
    }

    // a(i, s) and b(s, j): elements of the operands.
    template <class F, class G>
    std::string check(int64_t k, F a, G b) {
        return check(k, a, b, b);
    }

    // b(s, j) is the difference of two numbers whose magnitudes add up to size(s, j), and which are multiplied
    // separately.
    template <class F, class G, class H>
    std::string check(int64_t k, F a, G b, H size) {
        for (int64_t i = 0; i < m_; ++i) {
            for (int64_t j = 0; j < n_; ++j) {
                long double sum = adds_ ? value(i, j) : 0, magnitude = std::fabs(sum);
                for (int64_t s = 0; s < k; ++s) {
                    const long double term = static_cast<long double>(a(i, s)) * b(s, j);
                    sum += term, magnitude += std::fabs(static_cast<long double>(a(i, s)) * size(s, j));
                }
                const double error = std::fabs(static_cast<double>(c[i * ldc_ + j] - sum));
                if (!(error <= error_bound<A>(k + 1 + roundings_, static_cast<double>(magnitude)))) {
                    return "C[" + std::to_string(i) + "][" + std::to_string(j) + "] is off by " + std::to_string(error);
                }
            }
        }
        for (int64_t i = 0; i + 1 < written_; ++i) {
            for (int64_t j = room_; j < ldc_; ++j) {
                if (!c.untouched(i * ldc_ + j)) return "written between rows of C";
            }
        }
        return expect(c.guarded(), "written out of bounds of C");
    }

    Output<A> c;

private:
    static A value(int64_t i, int64_t j) { return static_cast<A>((i * 7 + j * 3) % 11 - 5); }

    int64_t m_, n_, ldc_, room_, written_;
    bool adds_;
    int64_t roundings_;
};

// A matrix [k, n], as panels `stride` apart.
template <class C>
struct Panels : Input<C> {
    Matrix<C> source;
    int64_t stride;

    Panels(int64_t k, int64_t n, int64_t gap)
        : Input<C>(ceil_div(n, kPanelColumns) * (panel_elements<C>(k) + gap) - gap),
          source(k, n, n),
          stride(panel_elements<C>(k) + gap) {
        for (int64_t i = 0; i < this->size(); ++i) (*this)[i] = C{};
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t s = 0; s < k; ++s) {
                (*this)[j / kPanelColumns * stride + in_panel<C>(s, j % kPanelColumns)] = source.row(s)[j];
            }
        }
    }
};

template <class T>
struct micro_gemm {
    using C = Compute<T>;
    using Micro = MicroGemm<C>;
    static constexpr int64_t P = kPack<C>, kUnit = Micro::kStaged ? kKMultiple<C> : 4 * P;

    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", Micro::kRows, Micro::kRows), k = shape.size("k", 2 * kUnit + 3, 0, kUnit);
        for (int64_t panels = 1; panels <= Micro::panels(m); ++panels) {
            const std::string result = run(shape, m, k, panels);
            if (result != "ok") return std::to_string(panels) + " panels: " + result;
        }
        return "ok";
    }

private:
    static std::string run(const Shape& shape, int64_t m, int64_t k, int64_t panels) {
        const bool adds = shape.is("adds", "1");
        const int64_t n = panels * kPanelColumns, ldc = shape.stride(n);
        Panels<C> b(k, n, shape.stride(0));
        Product<Acc<C>> product(m, n, ldc, n, Micro::kStaged ? round_up(m, 16) : m, adds);
        const int64_t k_steps = round_up(k, kKMultiple<C>) / P;
        const auto call = [&](const C* const* a, int64_t a_step) {
            Micro::gemm({static_cast<int>(m), static_cast<int>(panels), a, a_step, b.data(), b.stride, k_steps,
                         product.c.data(), ldc, adds});
        };
        const C* a[Micro::kRows];
        Output<C> staged(round_up(m, 16) * staged_row_stride<C>(k));
        if (shape.is("a", "panels")) {
            Panels<C> x(k, m, 0);
            if constexpr (Micro::kStaged) {
                Micro::stage_panels(x.data(), x.stride, 0, m, staged.data(), a);
            } else {
                kt::KT_ISA::point_into_panels(x.data(), x.stride, 0, m, a);
            }
            call(a, P * kPanelColumns);
            return product.check(
                k, [&](int64_t i, int64_t s) { return x.source.at(s, i); },
                [&](int64_t s, int64_t j) { return b.source.at(s, j); });
        }
        Matrix<C> x(m, k, shape.stride(k));
        const C* rows[Micro::kRows];
        for (int64_t i = 0; i < m; ++i) rows[i] = x.row(i);
        if constexpr (Micro::kStaged) {
            Micro::stage(rows, m, k, staged.data(), a);
            call(a, P);
        } else if (k % P) {
            kt::KT_ISA::stage_rows(rows, m, k, staged.data(), a);
            call(a, P);
        } else {
            call(rows, P);
        }
        return product.check(
            k, [&](int64_t i, int64_t s) { return x.at(i, s); },
            [&](int64_t s, int64_t j) { return b.source.at(s, j); });
    }
};

template <class T>
struct direct_dots {
    static std::string run(const Shape& shape) {
        constexpr int64_t kUnit = DotStep<T>::kWidth;
        const int64_t m = shape.size("m", kDotPass, kDotPass), n = shape.size("columns", 16, 0);
        const int64_t k = shape.size("k", 2 * kUnit + 3, 0, kUnit), ldc = shape.stride(n);
        Matrix<T> x(m, k, shape.stride(k)), w(n, k, shape.stride(k));
        std::vector<const T*> a;
        for (int64_t i = 0; i < m; ++i) a.push_back(x.row(i));
        Product<Acc<T>> product(m, n, ldc, n, m, false);
        Direct<T>::dots(a.data(), m, w.data(), w.stride, n, k, product.c.data(), ldc);
        return product.check(
            k, [&](int64_t i, int64_t s) { return x.at(i, s); }, [&](int64_t s, int64_t j) { return w.at(j, s); });
    }
};

template <class T>
struct direct_columns {
    static std::string run(const Shape& shape) {
        using Step = ColumnStep<T>;
        constexpr int64_t kUnit = kColumnVectors / Step::kVectors * Step::kColumns;
        const int64_t m = shape.size("m", kColumnPass, kColumnPass), n = shape.size("columns", 16, 0, kUnit);
        const int64_t k = shape.size("k", 7, 0, Direct<T>::kRowsAhead);
        const int64_t room = round_up(n, kPanelColumns), ldc = shape.stride(room);
        const bool adds = shape.is("adds", "1");
        Matrix<T> x(m, k, shape.stride(k)), w(k, n, shape.stride(n));
        std::vector<const T*> a;
        for (int64_t i = 0; i < m; ++i) a.push_back(x.row(i));
        Product<Acc<T>> product(m, n, ldc, room, m, adds);
        Direct<T>::columns(a.data(), m, w.data(), w.stride, n, k, product.c.data(), ldc, adds);
        return product.check(
            k, [&](int64_t i, int64_t s) { return x.at(i, s); }, [&](int64_t s, int64_t j) { return w.at(s, j); });
    }
};

}  // namespace suites
