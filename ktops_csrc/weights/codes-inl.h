#pragma once

// Products with the codes of integer formats, without converting them to floats: activations are codes too, with a
// scale per block (quantize_rows-inl.h). With q the unsigned code of a weight, s and z the scale and zero point of its
// group, a the code of an activation and t the scale of its block,
//
//   sum over k of s (q - z) t a = sum over groups of (s sum over blocks of t (sum of q a)) - s z (sum of t a)
//
// The sums of q a are exact; quantize_row() computes those of t a. Decoders of integer formats: formats/decoder-inl.h.

#include <cstdint>
#include <utility>

#include "isa/direct-inl.h"
#include "weights/code_rows-inl.h"

namespace kt::KT_ISA {

template <class Decoder, bool kZeros>
class CodeKernels {
    static constexpr int64_t kColumns = Decoder::kCodeColumns, kStep = Decoder::kCodeStep;
    static constexpr int V = static_cast<int>(kColumns / kCodeBytes);
    // With pairs, vectors v and v + S hold the even and the odd columns of the same pairs.
    static constexpr int S = Decoder::kPairs ? V / 2 : V;
    static constexpr int R = static_cast<int>(kDotRows);
    static constexpr bool kInUnit = Decoder::kCodeGroup > 0;
    static constexpr int64_t kGroups = kInUnit ? kColumns / Decoder::kCodeGroup : 1;
    using Rows = CodeRows<Decoder, kZeros>;
    static constexpr int64_t kUnitScales = Rows::kUnitScales;

public:
    // c[i][j] = x[i] . row (row + j), i < m <= kFewRows, x[i] being row index[i] of `x`.
    static void dots(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                     int64_t m, float* c, int64_t ldc) {
        with_few_rows(m, [&](auto rows) { dots_of<rows()>(w, e, row, n, x, index, m, c, ldc); });
    }

private:
    // The first column of the four that lane `lane` of vector v sums, or of their pairs.
    static constexpr int64_t column_of(int v, int lane) {
        return (v % S * kCodeBytes + 4 * lane) * (Decoder::kPairs ? 2 : 1);
    }

    template <int M>
    static void dots_of(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x,
                        const int64_t* index, int64_t m, float* c, int64_t ldc) {
        const int8_t* a[M];
        const float *a_scales[M], *a_sums[M];
        for (int i = 0; i < M; ++i) {
            const int64_t of = index[i < m ? i : 0];
            a[i] = x.row(of), a_scales[i] = x.row_scales(of), a_sums[i] = x.row_sums(of);
        }
        const PieceGroups whole = kInUnit ? PieceGroups() : PieceGroups(w, 0);  // the only one in most rows
        const auto add = [&](const DotRows& rows, int64_t ahead) __attribute__((always_inline)) {
            VecDotsF total[M][R] = {};
            Units<M> units(w, w.row(e, row + rows.first), rows.apart * w.row_bytes, ahead, a, a_scales);
            if constexpr (kInUnit) {
                add_units<M>(units, a_sums, total);
            } else if (w.group >= w.columns) {
                add_rows<M>(units, Groups(w, e, row, rows, PieceGroups(w, 0)), a_sums, total);
            } else {
                while (units.k < w.columns) {
                    const Groups groups(w, e, row, rows, whole.end == w.columns ? whole : PieceGroups(w, units.k));
                    take_zeros<M>(groups, a_sums, total);
                    add_groups<M>(units, w.group, groups, total);
                }
            }
            VecF sums[M][kDotRows];
            for (int i = 0; i < M; ++i) {
                for (int r = 0; r < R; ++r) sums[i][r] = in_one_register(total[i][r]);
            }
            put_dots<M>(sums, m, rows, [&](int64_t i, int64_t j, float sum) { c[i * ldc + j] = sum; });
        };
        const DotOrder order = streams(n, w.row_bytes);
        for (int64_t step = 0; step < order.count; ++step) {
            const DotRows rows = order.at(step);
            const int64_t ahead = read_ahead(order, step, w.row_bytes);
            prefetch_groups(w, e, row, order, step);
            const bool all = rows.count == kDotRows;  // fewer rows: one by one, each in place of all four
            for (int64_t j = 0; j < (all ? 1 : rows.count); ++j) add(all ? rows : DotRows{rows.first + j, 0, 1}, ahead);
        }
    }

    // The codes of a unit of activations, and the scale of every lane of their sums.
    template <int M>
    struct UnitOfRows {
        VecCodes codes[M][V];
        VecDotsF scale[M][S];
        const float* scales[M];  // from the first of the unit on

        template <int... Vs>
        __attribute__((always_inline)) UnitOfRows(const int8_t* const* a, const float* const* a_scales, int64_t k,
                                                  std::integer_sequence<int, Vs...>) {
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) codes[i][v] = load_bits<VecCodes>(a[i] + k + v * kCodeBytes);
                scales[i] = a_scales[i] + k / CodedRows::kBlock;
                ((scale[i][Vs] = of_blocks<Vs>(scales[i], std::make_integer_sequence<int, kDotLanes>())), ...);
            }
        }
    };

    // Spreads the scales of a unit's blocks to the lanes of vector v.
    template <int v, int... Is>
    __attribute__((always_inline)) static VecDotsF of_blocks(const float* scale, std::integer_sequence<int, Is...>) {
        constexpr int64_t kFirst = column_of(v, 0) / CodedRows::kBlock / 4 * 4;
        static_assert(column_of(v, kDotLanes - 1) / CodedRows::kBlock < kFirst + 4);
        const VecDotsF scales = repeat_four(scale + kFirst);
        return __builtin_shufflevector(scales, scales,
                                       static_cast<int>(column_of(v, Is) / CodedRows::kBlock - kFirst)...);
    }

    // Walks the units of kDotRows rows in parallel, each row a stream of memory.
    template <int M>
    struct Units {
        const uint8_t* unit;
        int64_t apart;  // bytes, from one row to the next
        const int64_t ahead, columns, last_k;
        const int8_t* const* a;
        const float* const* a_scales;
        int64_t k = 0;  // first column of the next units
        uint8_t last[R * kStep];

        Units(const WeightTensor& w, const uint8_t* first, int64_t apart, int64_t ahead, const int8_t* const* a,
              const float* const* a_scales)
            : unit(first),
              apart(apart),
              ahead(ahead),
              columns(w.columns),
              last_k(w.columns / kColumns * kColumns),
              a(a),
              a_scales(a_scales) {}

        // Calls f(r, unit of row r, its codes, those of activations) for every row, and moves on to the next units.
        template <class F>
        __attribute__((always_inline)) void next(F f) {
            if (__builtin_expect(k == last_k, 0)) {
                for (int r = 0; r < R; ++r) Rows::copy_last(unit + r * apart, columns - k, last + r * kStep);
                unit = last;
                apart = kStep;
            }
            const UnitOfRows<M> x(a, a_scales, k, std::make_integer_sequence<int, S>());
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint8_t* from = unit + r * apart;
#pragma GCC unroll 4
                for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(from + ahead + line);
                VecCodes codes[V];
                Decoder::codes(from, codes);
                f(r, from, codes, x);
            }
            unit += kStep;
            k += kColumns;
        }
    };

    // sums[i] = q a over the codes of a unit
    template <int M>
    __attribute__((always_inline)) static void dots_of_unit(const VecCodes (&codes)[V], const UnitOfRows<M>& x,
                                                            VecDots (&sums)[M][S]) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i)
                sums[i][v % S] = dot4<Decoder::kMaxCode>(v < S ? VecDots{} : sums[i][v % S], codes[v], x.codes[i][v]);
        }
    }

    // total[i][r] += the sums of a unit of row r, scaled group by group of kGroup columns.
    template <int M, int64_t kGroup>
    __attribute__((always_inline)) static void add_scaled(const VecCodes (&codes)[V], const UnitOfRows<M>& x,
                                                          const float* scale, int r, VecDotsF (&total)[M][R]) {
        VecDots sums[M][S];
        dots_of_unit<M>(codes, x, sums);
        add_products<M, kGroup>(sums, x, scale, r, total, std::make_integer_sequence<int, S>());
    }

    template <int M, int64_t kGroup, int... Vs>
    __attribute__((always_inline)) static void add_products(const VecDots (&sums)[M][S], const UnitOfRows<M>& x,
                                                            const float* scale, int r, VecDotsF (&total)[M][R],
                                                            std::integer_sequence<int, Vs...>) {
        constexpr auto kIs = std::make_integer_sequence<int, kDotLanes>();
        if constexpr (kGroup > CodedRows::kBlock) {
            const VecDotsF factors[] = {GroupLanes<kGroup, Vs>::spread(GroupLanes<kGroup, Vs>::load(scale), kIs)...};
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) {
                ((total[i][r] += dots_to_floats(sums[i][Vs]) * (factors[Vs] * x.scale[i][Vs])), ...);
            }
        } else {
            const VecDotsF scales[] = {GroupLanes<kGroup, Vs>::load(scale)...};
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) {
                ((total[i][r] += dots_to_floats(sums[i][Vs]) *
                                 GroupLanes<kGroup, Vs>::spread(
                                     scales[Vs] * GroupLanes<kGroup, Vs>::load_blocks(x.scales[i], kIs), kIs)),
                 ...);
            }
        }
    }

    // Loads a number per group of a unit into a register, and spreads them to the lanes of vector v.
    template <int64_t kGroup, int v>
    struct GroupLanes {
        static constexpr int64_t kBegin = column_of(v, 0) / kGroup, kEnd = column_of(v, kDotLanes - 1) / kGroup + 1;
        static constexpr bool kOne = kEnd - kBegin == 1;
        // Scales stored in a unit are in a register. Others are loaded only as far as needed, since a load that spans
        // several recent stores has to wait for them.
        static constexpr bool kFew = !kInUnit && kEnd - kBegin <= 4;
        static constexpr int64_t kFirst = kOne || kFew ? kBegin : kBegin / kDotLanes * kDotLanes;

        __attribute__((always_inline)) static VecDotsF load(const float* numbers) {
            if constexpr (kOne) return numbers[kFirst] - VecDotsF{};
            return kFew ? repeat_four(numbers + kFirst) : load_bits<VecDotsF>(numbers + kFirst);
        }
        // Loads numbers of blocks, for groups that are no longer than a block.
        template <int... Is>
        __attribute__((always_inline)) static VecDotsF load_blocks(const float* numbers,
                                                                   std::integer_sequence<int, Is...>) {
            constexpr int64_t kParts = CodedRows::kBlock / kGroup;
            if constexpr (kParts == 1) {
                return load(numbers);
            } else {
                static_assert(!kOne && kFirst % kParts == 0);
                const auto blocks = load_bits<VecDotsF>(numbers + kFirst / kParts);
                return __builtin_shufflevector(blocks, blocks, static_cast<int>(Is / kParts)...);
            }
        }
        template <int... Is>
        __attribute__((always_inline)) static VecDotsF spread(VecDotsF numbers, std::integer_sequence<int, Is...>) {
            if constexpr (kOne) return numbers;
            return __builtin_shufflevector(numbers, numbers, static_cast<int>(column_of(v, Is) / kGroup - kFirst)...);
        }
    };

    // s z of groups [g, g + kDotLanes) of a unit, zeros past its last group.
    template <int... Is>
    __attribute__((always_inline)) static VecDotsF zeros_of(const float* scale, int64_t g,
                                                            std::integer_sequence<int, Is...>) {
        const auto numbers = load_bits<VecDotsF>(scale + g);
        if constexpr (!Decoder::kMins) {
            return numbers * static_cast<float>(Decoder::kZeroCode);
        } else if constexpr (kGroups < kDotLanes) {
            static_assert(2 * kGroups == kDotLanes);
            return __builtin_shufflevector(numbers, VecDotsF{}, (Is + static_cast<int>(kGroups))...);
        } else {
            return load_bits<VecDotsF>(scale + kGroups + g);
        }
    }

    // For formats with scales in the units.
    template <int M>
    __attribute__((always_inline)) static void add_units(Units<M>& units, const float* const* a_sums,
                                                         VecDotsF (&total)[M][R]) {
        while (units.k < units.columns) {
            const int64_t group = units.k / Decoder::kCodeGroup;
            units.next([&](int r, const uint8_t* unit, const VecCodes(&codes)[V],
                           const UnitOfRows<M>& x) __attribute__((always_inline)) {
                float scale[kUnitScales];
                Decoder::code_scales(unit, scale);
#pragma GCC unroll 2
                for (int64_t g = 0; g < kGroups; g += kDotLanes) {
                    const VecDotsF zeros = zeros_of(scale, g, std::make_integer_sequence<int, kDotLanes>());
#pragma GCC unroll 4
                    for (int i = 0; i < M; ++i) total[i][r] -= zeros * load_bits<VecDotsF>(a_sums[i] + group + g);
                }
                add_scaled<M, Decoder::kCodeGroup>(codes, x, scale, r, total);
            });
        }
    }

    // The groups of a row's piece that starts at column k.
    struct PieceGroups {
        int64_t end = 0, first = 0, count = 0;
        bool begins = false;  // at the start of the first group

        PieceGroups() = default;
        PieceGroups(const WeightTensor& w, int64_t k)
            : end(smaller(w.columns, (k / kPiece + 1) * kPiece)),
              first(k / w.group),
              count((end - 1) / w.group - first + 1),
              begins(k % w.group == 0) {}
    };

    // Their scales, and zero points if any, in kDotRows rows, followed by zeros.
    struct Groups : PieceGroups {
        static constexpr int64_t kRoom = group_room(kPieceGroups + 1) + kDotLanes;
        float scale[R][kRoom], zero[kZeros ? R : 1][kZeros ? kRoom : 1];

        __attribute__((always_inline)) Groups(const WeightTensor& w, int64_t e, int64_t row, const DotRows& rows,
                                              const PieceGroups& piece)
            : PieceGroups(piece) {
            for (int r = 0; r < R; ++r) {
                Rows::load_scales(w, e, row + rows.row(r), this->first, this->count, scale[r]);
                if constexpr (kZeros) load_groups(w.zero, e, row + rows.row(r), this->first, this->count, zero[r]);
            }
        }
    };

    template <int M>
    __attribute__((always_inline)) static void take_zeros(const Groups& groups, const float* const* a_sums,
                                                          VecDotsF (&total)[M][R]) {
        for (int64_t g = 0; g < groups.count; g += kDotLanes) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const VecDotsF zero = kZeros ? load_bits<VecDotsF>(groups.zero[kZeros ? r : 0] + g)
                                             : VecDotsF{} + static_cast<float>(Decoder::kZeroCode);
                VecDotsF mins = load_bits<VecDotsF>(groups.scale[r] + g) * zero;
                if (__builtin_expect(g == 0 && !groups.begins, 0)) mins[0] = 0;  // subtracted with the piece before
#pragma GCC unroll 4
                for (int i = 0; i < M; ++i) total[i][r] -= mins * load_bits<VecDotsF>(a_sums[i] + groups.first + g);
            }
        }
    }

    // For rows with one scale each, the same in every piece.
    template <int M>
    __attribute__((always_inline)) static void add_rows(Units<M>& units, const Groups& row, const float* const* a_sums,
                                                        VecDotsF (&total)[M][R]) {
        while (units.k < units.columns) {
            units.next([&](int r, const uint8_t*, const VecCodes(&codes)[V], const UnitOfRows<M>& x)
                           __attribute__((always_inline)) {
                               VecDots sums[M][S];
                               dots_of_unit<M>(codes, x, sums);
#pragma GCC unroll 4
                               for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
                                   for (int v = 0; v < S; ++v) {
                                       total[i][r] += dots_to_floats(sums[i][v]) * x.scale[i][v];
                                   }
                               }
                           });
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const float zero = kZeros ? row.zero[kZeros ? r : 0][0] : static_cast<float>(Decoder::kZeroCode);
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) {
                total[i][r][0] -= zero * a_sums[i][0];
                total[i][r] *= row.scale[r][0];
            }
        }
    }

    template <int M>
    __attribute__((always_inline)) static void add_groups(Units<M>& units, int64_t group, const Groups& groups,
                                                          VecDotsF (&total)[M][R]) {
        if (group % kColumns == 0) {
            add_parts<M, kColumns>(units, group, groups, total);
        } else if (group == 32) {
            add_parts<M, 32>(units, 32, groups, total);
        } else if (group == 64) {
            add_parts<M, 64>(units, 64, groups, total);
        } else {
            add_uneven_groups<M>(units, group, groups, total);
        }
    }

    // For units of several groups of kGroup columns, or groups of several units.
    template <int M, int64_t kGroup>
    __attribute__((always_inline)) static void add_parts(Units<M>& units, int64_t group, const Groups& groups,
                                                         VecDotsF (&total)[M][R]) {
        while (units.k < groups.end) {
            const int64_t g = units.k / group - groups.first;
            const auto add =
                [&](int r, const uint8_t*, const VecCodes(&codes)[V], const UnitOfRows<M>& x)
                    __attribute__((always_inline)) { add_scaled<M, kGroup>(codes, x, groups.scale[r] + g, r, total); };
            units.next(add);
        }
    }

    // For groups that end within a unit.
    template <int M>
    __attribute__((always_inline)) static void add_uneven_groups(Units<M>& units, int64_t group, const Groups& groups,
                                                                 VecDotsF (&total)[M][R]) {
        while (units.k < groups.end) {
            const int64_t k = units.k;
            units.next([&](int r, const uint8_t*, const VecCodes(&codes)[V], const UnitOfRows<M>& x) {
                VecDots sums[M][S];
                dots_of_unit<M>(codes, x, sums);
                for (int v = 0; v < S; ++v) {
                    float lanes[kDotLanes];
                    for (int lane = 0; lane < kDotLanes; ++lane) {
                        const int64_t g = (k + column_of(v, lane)) / group - groups.first;
                        lanes[lane] = g < groups.count ? groups.scale[r][g] : 0;
                    }
                    const auto factor = load_bits<VecDotsF>(lanes);
                    for (int i = 0; i < M; ++i) total[i][r] += dots_to_floats(sums[i][v]) * (factor * x.scale[i][v]);
                }
            });
        }
    }
};

}  // namespace kt::KT_ISA
