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
#include "isa/micro_gemm_generic-inl.h"
#include "isa/panel-inl.h"
#include "isa/vec-inl.h"

namespace kt::KT_ISA {

// Rows of A that one pass over B multiplies, by the number of registers. AVX-512 has 32: 6 x 4 vectors of sums leave
// room for the operands. AVX2 and SSE2 have 16. Dots keep 3 x 4 sums, but see Direct::kLeavesRegister. Sums of columns
// keep 5 x 2 with AVX2; with SSE2, which broadcasts in two instructions, 3 x 4 are best although not all fit.
constexpr bool kIsAvx2 = Isa::kVectorBytes == 32;
constexpr int kDotPass = Isa::kVectorBytes == 64 ? 6 : 3;
constexpr int kColumnPass = Isa::kVectorBytes == 64 ? 6 : kIsAvx2 ? 5 : 3, kColumnVectors = kIsAvx2 ? 2 : 4;

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
    using Factor = Acc<T>;
    static constexpr int64_t kRows = 1, kColumns = kLanes<Acc<T>>;
    static constexpr int kVectors = 1;

    // loads `rows` rows of n columns; the others are zeros
    static void load(const T* w, int64_t, int64_t, int64_t n, V* out) { out[0] = load_n(w, n); }
    // the elements of a row of A for these rows, in every lane
    static V spread(const Factor* a, int64_t) { return broadcast(read(a)); }
    static V add(V sum, V x, V y) { return sum + x * y; }
    // Vectors of sums may hold the columns in an order of their own, unlike C. n: the columns that are left.
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

// The order in which n rows of W are read: `each` streams of `apart` rows each, then the remaining rows; or `each`
// neighbors at a time.
struct DotOrder {
    int64_t each, apart, count;

    DotOrder(int64_t n, bool streams, int64_t each = kDotRows)
        : each(each), apart(streams && n >= 2 * each ? n / each : 1), count(ceil_div(n, each)), rows_(n) {}

    DotRows at(int64_t step) const {
        if (step < apart && apart > 1) return {step, apart, each};
        const int64_t first = step * each;
        return {first, 1, smaller(each, rows_ - first)};
    }

private:
    int64_t rows_;
};

template <class T>
class Direct {
public:
    static constexpr int64_t kRowsAhead = 64;  // rows of W between the prefetch to L2 and use

private:
    using A = Acc<T>;
    using Step = ColumnStep<T>;
    using Factor = typename Step::Factor;
    // Dots of numbers widened with a mask need a register for it. With 3 x 4 sums, five were in memory, which took 1.4
    // times as long as 2 x 4 or, for more than four rows, 3 x 3.
    static constexpr bool kLeavesRegister = kIsAvx2 && DotStep<T>::kParts > 1;
    static constexpr int kSteps = kColumnVectors / Step::kVectors;             // column steps at once
    static constexpr int64_t kUnrolledRows = (kIsAvx2 ? 4 : 1) * Step::kRows;  // of B, from prefetch to prefetch
    // Sums of columns: a strip of columns has its sums in registers while the rows of a group are added to them. With
    // AVX2, a strip is half a cache line of bfloat16, and several passes read it. Rows of W may be a power of two
    // apart, so that their lines share a set of L1: eight stay there, and so do the sums of a slab.
    static constexpr int64_t kStrip = kSteps * Step::kColumns;
    static constexpr int64_t kGroup = kIsAvx2 ? 8 : kRowsAhead, kSlab = kIsAvx2 ? 512 : kStrip;
    // C has the order of the vectors of sums until all rows are added.
    static constexpr bool kKeepsOrder = kGroup < kRowsAhead;
    static_assert(!kKeepsOrder || kPanelColumns % Step::kColumns == 0, "C has room for whole vectors of sums");
    static constexpr int64_t kPrefetch = 1024 / sizeof(T);  // elements: far enough to hide memory, near enough for L1
    static constexpr int64_t kLine = 64 / sizeof(T), kPage = 4096 / sizeof(T);

public:
    // C[i][j] = a[i] . row j of W, for i < m and j < n. Rows of W are `stride` apart.
    static void dots(const T* const* a, int64_t m, const T* w, int64_t stride, int64_t n, int64_t k, A* c,
                     int64_t ldc) {
        const bool few = kLeavesRegister && m <= 4;
        const int64_t passes = ceil_div(m, few ? 2 : kDotPass), pass_rows = ceil_div(m, passes);
        // Reading rows of the same page side by side is slower: by a quarter for rows of 1.5 KiB if bound by memory.
        const DotOrder order(n, passes == 1 && stride < kPage && n / kDotRows * stride >= kPage,
                             kLeavesRegister && !few ? 3 : kDotRows);
        for (int64_t step = 0; step < order.count; ++step) {
            const DotRows rows = order.at(step);
            const T* next = w + order.at(step + 1).first * stride;
            for (int64_t pass = 0; pass < passes; ++pass) {
                const int64_t i = pass * pass_rows;
                const Share ahead(order.each, pass, passes);
                const int64_t height = smaller(pass_rows, m - i);
                const T* first = w + rows.first * stride;
                A* out = c + i * ldc + rows.first;
                if (rows.apart == 1) {
                    dots_rows(a + i, height, first, rows.count, next, stride, k, out, ldc, ahead);
                    continue;
                }
                A sums[kDotPass * kDotRows];
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
        const int64_t passes = ceil_div(m, kColumnPass), pass_rows = ceil_div(m, passes);
        if (kKeepsOrder && accumulate) reorder<true>(m, n, c, ldc);
        for (int64_t s = 0; s < k; s += kRowsAhead) {
            RowsAhead ahead(w + (s + kRowsAhead) * stride, stride, n);
            ahead.lines = ceil_div(kUnrolledRows * kStrip, kLine * passes);
            Rank g{nullptr, 0, smaller(kRowsAhead, k - s), w + s * stride, stride, n, c, ldc, accumulate || s > 0};
            for (int64_t i = 0; i < m; i += kFactorRows, g.c += kFactorRows * ldc) {
                const int64_t count = smaller(kFactorRows, m - i);
                const Factors factors(a + i, count, s, g.rows);
                g.a = factors.rows;
                add_groups(g, count, pass_rows, ahead);
            }
        }
        if (kKeepsOrder) reorder<false>(m, n, c, ldc);
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
        with_constant<kDotPass>(m, [&](auto rows) {
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
        int64_t stride, width, lines = 0;  // lines: at a time

        RowsAhead(const T* w, int64_t stride, int64_t n)
            : next(w), end(w + round_up(n, kLine)), stride(stride), width(round_up(n, kLine)) {}

        void prefetch() {
            for (int64_t i = 0; i < lines; ++i) {
                __builtin_prefetch(next, 0, 2);
                next += kLine;
                if (next != end) continue;
                next += stride - width;
                end += stride;
            }
        }
    };

    // Elements [s, s + n) of rows of A, n <= kRowsAhead, widened if needed.
    static constexpr int64_t kFactorRows = 32;
    struct Factors {
        Factors(const T* const* a, int64_t m, int64_t s, int64_t n) {
            const T* from[kFactorRows];
            for (int64_t i = 0; i < m; ++i) from[i] = a[i] + s;
            if constexpr (kInPlace) {
                for (int64_t i = 0; i < m; ++i) rows[i] = from[i];
            } else {
                stage_rows(from, m, n, widened, rows);
            }
        }

        static constexpr bool kInPlace = std::is_same_v<Factor, T>;
        const Factor* rows[kFactorRows];
        alignas(64) Factor widened[kInPlace ? 1 : kFactorRows * staged_row_stride<Factor>(kRowsAhead)];
    };

    // Sums of n columns of C, which has the order of vectors of sums or its own.
    template <bool kSameOrder>
    static void load_sums(const A* c, int64_t n, Vec<A>* sums) {
        if constexpr (!kSameOrder) return Step::load_sums(c, n, sums);
#pragma GCC unroll 8
        for (int v = 0; v < Step::kVectors; ++v) sums[v] = load(c + v * kLanes<A>);
    }
    template <bool kSameOrder>
    static void store_sums(A* c, int64_t n, const Vec<A>* sums) {
        if constexpr (!kSameOrder) return Step::store_sums(c, n, sums);
#pragma GCC unroll 8
        for (int v = 0; v < Step::kVectors; ++v) store(c + v * kLanes<A>, sums[v]);
    }

    // Puts C into the order of vectors of sums, or back.
    template <bool kTo>
    static void reorder(int64_t m, int64_t n, A* c, int64_t ldc) {
        if constexpr (Step::kVectors > 1) {
            for (int64_t i = 0; i < m; ++i, c += ldc) {
                for (int64_t j = 0; j < n; j += Step::kColumns) {
                    Vec<A> sums[Step::kVectors];
                    load_sums<!kTo>(c + j, Step::kColumns, sums);
                    store_sums<kTo>(c + j, Step::kColumns, sums);
                }
            }
        }
    }

    // C[i][j] (+)= sum over s < rows of a[i][first + s] . w[s * stride + j]
    struct Rank {
        const Factor* const* a;
        int64_t first, rows;
        const T* w;
        int64_t stride, n;
        A* c;
        int64_t ldc;
        bool accumulate;
    };

    // m rows of C, pass_rows at a time.
    static void add_groups(const Rank& all, int64_t m, int64_t pass_rows, RowsAhead& ahead) {
        Rank g = all;
        for (int64_t j = 0; j < all.n; j += kSlab) {
            g.n = smaller(kSlab, all.n - j);
            for (int64_t s = 0; s < all.rows; s += kGroup) {
                g.first = s;
                g.rows = smaller(kGroup, all.rows - s);
                g.w = all.w + s * g.stride + j;
                g.accumulate = all.accumulate || s > 0;
                for (int64_t i = 0; i < m; i += pass_rows) {
                    g.a = all.a + i;
                    g.c = all.c + i * g.ldc + j;
                    with_constant<kColumnPass>(smaller(pass_rows, m - i), [&](auto rows) { strips<rows()>(g, ahead); });
                }
            }
        }
    }

    template <int M>
    static void strips(const Rank& g, RowsAhead& ahead) {
        int64_t j = 0;
        for (; j + kStrip <= g.n; j += kStrip) strip<M, kSteps>(g, j, Step::kColumns, ahead);
        for (; j < g.n; j += Step::kColumns) strip<M, 1>(g, j, smaller(Step::kColumns, g.n - j), ahead);
    }

    // G times `count` columns.
    template <int M, int G>
    __attribute__((always_inline)) static void strip(const Rank& g, int64_t column, int64_t count, RowsAhead& ahead) {
        constexpr int N = Step::kVectors;
        constexpr int64_t kColumns = Step::kColumns;
        Vec<A> sums[M][G * N] = {};
        const Factor* a[M];
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
        const T* w = g.w + column;
        int64_t s = 0;
        RowsAhead rows = ahead;
        for (; s + kUnrolledRows <= g.rows; s += kUnrolledRows) {
            rows.prefetch();
#pragma GCC unroll 4
            for (int64_t u = 0; u < kUnrolledRows; u += Step::kRows, w += Step::kRows * g.stride) {
                multiply(w, s + u, Step::kRows);
            }
        }
        ahead = rows;
        for (; s < g.rows; s += Step::kRows, w += Step::kRows * g.stride) {
            multiply(w, s, smaller(Step::kRows, g.rows - s));
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < G; ++j) {
                A* c = g.c + i * g.ldc + column + j * kColumns;
                if (g.accumulate) {  // last: adding up sums of a group's terms loses less than one long sum
                    Vec<A> before[N];
                    load_sums<kKeepsOrder>(c, count, before);
#pragma GCC unroll 8
                    for (int v = 0; v < N; ++v) sums[i][j * N + v] += before[v];
                }
                store_sums<kKeepsOrder>(c, count, sums[i] + j * N);
            }
        }
    }
};

}  // namespace kt::KT_ISA
