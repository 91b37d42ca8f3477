#pragma once

// Products for experts with few rows: B is read once, in place, without panels.
//
//   dots       C = A . W^T   dot products of rows of A with rows of W
//   columns    C (+)= A . W  sums of rows of W, each times an element of A

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/bfloat16.h"
#include "core/views.h"
#include "isa/panel-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Rows of A that one pass over rows of B multiplies: as many as there are registers for their sums.
constexpr int kPassRows = Isa::kVectorBytes == 64 ? 6 : 3;

// Multiplies kWidth elements of two rows and adds up the products, in kParts instructions. load: the operand of a part,
// from n elements.
template <class T>
struct DotStep {
    static constexpr int64_t kWidth = kLanes<Acc<T>>;
    static constexpr int kParts = 1;
    static Vec<Acc<T>> load(const T* p, int64_t n, int) { return load_n(p, n); }
    static Vec<Acc<T>> add(Vec<Acc<T>> sum, Vec<Acc<T>> x, Vec<Acc<T>> y) { return sum + x * y; }
};

// Adds kRows rows of kColumns columns of B, times elements of A, to kVectors vectors of sums.
template <class T>
struct ColumnStep {
    using V = Vec<Acc<T>>;
    static constexpr int64_t kRows = 1, kColumns = kLanes<Acc<T>>;
    static constexpr int kVectors = 1;

    // loads `rows` rows of n columns; the others are zeros
    static void load(const T* w, int64_t, int64_t, int64_t n, V* out) { out[0] = load_n(w, n); }
    // the elements of a row of A for these rows, in every lane
    static V spread(const T* a, int64_t) { return broadcast(load_scalar(a)); }
    static V add(V sum, V x, V y) { return sum + x * y; }
    static void load_sums(const Acc<T>* c, int64_t, V* sums) { sums[0] = KT_ISA::load(c); }
    static void store_sums(Acc<T>* c, int64_t, const V* sums) { store(c, sums[0]); }
};

// For bfloat16: in direct_widened-inl.h, or in direct_avx512_bf16-inl.h for ISAs with an instruction for it.
template <>
struct DotStep<bfloat16>;
template <>
struct ColumnStep<bfloat16>;

// Calls f(count), 1 <= count <= kMost, with a compile-time constant.
template <int kMost, class F>
inline void with_constant(int64_t count, F f) {
    if constexpr (kMost > 1) {
        if (count < kMost) return with_constant<kMost - 1>(count, f);
    }
    f(std::integral_constant<int, kMost>());
}

// Rows of W that are read at once: `count` of them, every `apart`-th row.
constexpr int64_t kDotRows = 4;
struct DotRows {
    int64_t first, apart, count;

    int64_t row(int64_t i) const { return first + smaller(i, count - 1) * apart; }
};

// The order in which n rows of W are read: kDotRows streams of `apart` rows each, then the remaining rows; or kDotRows
// neighbors at a time.
struct DotOrder {
    int64_t apart, count;

    DotOrder(int64_t n, bool streams)
        : apart(streams && n >= 2 * kDotRows ? n / kDotRows : 1), count(ceil_div(n, kDotRows)), rows_(n) {}

    DotRows at(int64_t step) const {
        if (step < apart && apart > 1) return {step, apart, kDotRows};
        const int64_t first = step * kDotRows;
        return {first, 1, smaller(kDotRows, rows_ - first)};
    }

private:
    int64_t rows_;
};

template <class T>
class Direct {
    using A = Acc<T>;
    using Step = ColumnStep<T>;
    static constexpr int kSteps = 4 / Step::kVectors;       // column steps at once
    static constexpr int64_t kPrefetch = 1024 / sizeof(T);  // elements: far enough to hide memory, near enough for L1
    static constexpr int64_t kLine = 64 / sizeof(T), kPage = 4096 / sizeof(T);

public:
    static constexpr int64_t kRowsAhead = 64;  // rows of W between the prefetch to L2 and use

    // C[i][j] = a[i] . row j of W, for i < m and j < n. Rows of W are `stride` apart.
    static void dots(const T* const* a, int64_t m, const T* w, int64_t stride, int64_t n, int64_t k, A* c,
                     int64_t ldc) {
        const int64_t passes = ceil_div(m, kPassRows), pass_rows = ceil_div(m, passes);
        // Reading rows of the same page side by side is slower: by a quarter for rows of 1.5 KiB if bound by memory.
        const DotOrder order(n, passes == 1 && stride < kPage && n / kDotRows * stride >= kPage);
        for (int64_t step = 0; step < order.count; ++step) {
            const DotRows rows = order.at(step);
            const T* next = w + order.at(step + 1).first * stride;
            for (int64_t pass = 0; pass < passes; ++pass) {
                const int64_t i = pass * pass_rows;
                const Share ahead(kDotRows, pass, passes);
                const int64_t height = smaller(pass_rows, m - i);
                const T* first = w + rows.first * stride;
                A* out = c + i * ldc + rows.first;
                if (rows.apart == 1) {
                    dots_rows(a + i, height, first, rows.count, next, stride, k, out, ldc, ahead);
                    continue;
                }
                A sums[kPassRows * kDotRows];
                dots_rows(a + i, height, first, rows.count, next, rows.apart * stride, k, sums, kDotRows, ahead);
                for (int64_t j = 0; j < height * kDotRows; ++j) {
                    out[j / kDotRows * ldc + j % kDotRows * rows.apart] = sums[j];
                }
            }
        }
    }

    // C[i][j] (+)= sum over s < k of a[i][s] . W[s][j], for i < m and j < n. Rows of W are `stride` apart; rows of C
    // have room for a multiple of kPanelColumns columns.
    static void columns(const T* const* a, int64_t m, const T* w, int64_t stride, int64_t n, int64_t k, A* c,
                        int64_t ldc, bool accumulate) {
        const int64_t passes = ceil_div(m, kPassRows), pass_rows = ceil_div(m, passes);
        for (int64_t s = 0; s < k; s += kRowsAhead, accumulate = true) {
            RowsAhead ahead(w + (s + kRowsAhead) * stride, stride, n);
            Rank g{nullptr, s, smaller(kRowsAhead, k - s), nullptr, stride, 0, nullptr, ldc, accumulate};
            for (int64_t j = 0; j < n; j += g.n) {
                const bool wide = n - j >= kSteps * Step::kColumns;
                g.w = w + s * stride + j;
                g.n = wide ? kSteps * Step::kColumns : smaller(Step::kColumns, n - j);
                const int64_t lines = ceil_div(Step::kRows * g.n, kLine * passes);
                for (int64_t i = 0; i < m; i += pass_rows) {
                    g.a = a + i;
                    g.c = c + i * ldc + j;
                    with_constant<kPassRows>(smaller(pass_rows, m - i), [&](auto rows) {
                        wide ? columns_kernel<rows(), kSteps>(g, ahead, lines)
                             : columns_kernel<rows(), 1>(g, ahead, lines);
                    });
                }
            }
        }
    }

private:
    // The share of the next n rows that one of several passes over the same rows of W prefetches, so that memory is
    // busy even while a pass reads from the cache.
    struct Share {
        int64_t first, last, passes;
        Share(int64_t n, int64_t pass, int64_t passes)
            : first(n * pass / passes), last(n * (pass + 1) / passes), passes(passes) {}
    };

    static void dots_rows(const T* const* a, int64_t m, const T* w, int64_t n, const T* next, int64_t stride, int64_t k,
                          A* c, int64_t ldc, const Share& share) {
        with_constant<kPassRows>(m, [&](auto rows) {
            with_constant<kDotRows>(
                n, [&](auto columns) { dots_kernel<rows(), columns()>(a, w, next, stride, k, c, ldc, share); });
        });
    }

    // next: the rows of W to read after these.
    template <int M, int N>
    static void dots_kernel(const T* const* a, const T* w, const T* next, int64_t stride, int64_t k, A* c, int64_t ldc,
                            const Share& share) {
        constexpr int64_t W = DotStep<T>::kWidth;
        Vec<A> sums[M][N] = {};
        const auto multiply = [&](int64_t s, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int part = 0; part < DotStep<T>::kParts; ++part) {
                decltype(DotStep<T>::load(w, n, part)) x[M];
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) x[i] = DotStep<T>::load(a[i] + s, n, part);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) {
                    const auto y = DotStep<T>::load(w + j * stride + s, n, part);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) sums[i][j] = DotStep<T>::add(sums[i][j], x[i], y);
                }
            }
        };
        int64_t s = 0;
        const auto run = [&](int64_t end, auto prefetch) __attribute__((always_inline)) {
            for (; s + W <= end; s += W) {
                prefetch();
                multiply(s, W);
            }
        };
        if (share.passes > 1) {
            run(k, [&]() __attribute__((always_inline)) {
                for (int64_t j = share.first; j < share.last; ++j) __builtin_prefetch(next + j * stride + s, 0, 2);
            });
        } else {
            const auto all = [&](const T* rows) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) __builtin_prefetch(rows + j * stride + s);
            };
            run(k - kPrefetch, [&]() __attribute__((always_inline)) { all(w + kPrefetch); });
            run(k, [&]() __attribute__((always_inline)) { all(next + kPrefetch - k); });
        }
        if (s < k) multiply(s, k - s);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) put_sums<A, N>(sums[i], c + i * ldc);
    }

    // Prefetches the rows of W after those in use, line by line in memory order. Reading only a line or two of a page
    // at a time would be about half as fast.
    struct RowsAhead {
        const T *next, *end;
        int64_t stride, width;

        RowsAhead(const T* w, int64_t stride, int64_t n)
            : next(w), end(w + round_up(n, kLine)), stride(stride), width(round_up(n, kLine)) {}

        void prefetch(int64_t lines) {
            for (; lines > 0; --lines) {
                __builtin_prefetch(next, 0, 2);
                next += kLine;
                if (next != end) continue;
                next += stride - width;
                end += stride;
            }
        }
    };

    // C[i][j] (+)= sum over s < rows of a[i][first + s] . w[s * stride + j]
    struct Rank {
        const T* const* a;
        int64_t first, rows;
        const T* w;
        int64_t stride, n;
        A* c;
        int64_t ldc;
        bool accumulate;
    };

    template <int M, int G>
    static void columns_kernel(const Rank& g, RowsAhead& ahead, int64_t lines) {
        constexpr int N = Step::kVectors;
        constexpr int64_t kColumns = Step::kColumns;
        const int64_t count = G > 1 ? kColumns : g.n;
        Vec<A> sums[M][G * N] = {};
        const T* a[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) a[i] = g.a[i] + g.first;
        const auto multiply = [&](const T* w, int64_t s, int64_t rows) __attribute__((always_inline)) {
            typename Step::V b[G * N];
#pragma GCC unroll 8
            for (int j = 0; j < G; ++j) Step::load(w + j * kColumns, g.stride, rows, count, b + j * N);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                const auto x = Step::spread(a[i] + s, rows);
#pragma GCC unroll 8
                for (int j = 0; j < G * N; ++j) sums[i][j] = Step::add(sums[i][j], x, b[j]);
            }
        };
        const T* w = g.w;
        int64_t s = 0;
        RowsAhead rows = ahead;
        for (; s + Step::kRows <= g.rows; s += Step::kRows, w += Step::kRows * g.stride) {
            rows.prefetch(lines);
            multiply(w, s, Step::kRows);
        }
        ahead = rows;
        if (s < g.rows) multiply(w, s, g.rows - s);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < G; ++j) {
                A* c = g.c + i * g.ldc + j * kColumns;
                if (g.accumulate) {  // last: adding up sums of kRowsAhead terms loses less than one long sum
                    Vec<A> before[N];
                    Step::load_sums(c, count, before);
#pragma GCC unroll 8
                    for (int v = 0; v < N; ++v) sums[i][j * N + v] += before[v];
                }
                Step::store_sums(c, count, sums[i] + j * N);
            }
        }
    }
};

}  // namespace kt::KT_ISA
