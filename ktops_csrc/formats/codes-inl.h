#pragma once

// Products with the codes of integer formats, without making floats of them: rows of activations are codes too, with a
// scale each (quantize_row). With q the unsigned code of a weight, s and z its group's scale and zero point, and a that
// of an activation,
//
//   sum over k of s (q - z) a = sum over groups of s (sum of q a) - s z (sum of a)
//
// The sums over q a are exact, and those over a are known from quantize_row. A decoder of an integer format has
//   kZeroCode       z, where groups have no zero point of their own
//   kCodeStep       bytes of a VecCodes of weights
//   codes(bytes)    these, in the order of chunks

#include "formats/decoder-inl.h"
#include "formats/format_table.h"
#include "formats/groups-inl.h"
#include "isa/direct-inl.h"
#include "isa/dot4-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

template <class Decoder, bool kZeros>
class CodeKernels {
    static constexpr int64_t kStep = Decoder::kCodeStep;

public:
    // c[i][j] = x[i] . row (row + j), i < m <= kFewRows, x[i] being row index[i] of `x`.
    static void dots(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                     int64_t m, float* c, int64_t ldc) {
        with_few_rows(m, [&](auto rows) { dots_of<rows()>(w, e, row, n, x, index, m, c, ldc); });
    }

    // Codes [k, k + kn) of 16 rows, of which n exist, as a panel: [kn / 4][16][4]. kn is a multiple of 64; what lies
    // beyond the last column is any code. rows: scratch of 16 rows of kn + 64.
    static void panel(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* rows,
                      uint8_t* panel) {
        const int64_t stride = kn + 64;
        for (int64_t j = 0; j < n; ++j) {
            const uint8_t* codes = row_codes(w, e, row + j);
            for (int64_t i = 0; i < kn; i += kCodeBytes) {
                const VecCodes v = load(codes, k + i, w.columns);
                std::memcpy(rows + j * stride + i, &v, sizeof(v));
            }
        }
        for (int64_t i = 0; i < kn; i += 64) {
            KT_TRANSPOSE_16X16(reinterpret_cast<const char*>(rows + i), stride,
                               reinterpret_cast<uint32_t*>(panel + i * kPanelColumns));
        }
    }

    // Scales of groups [first, first + count) of a row, and scale * zero.
    static void scales(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t count, float* scale,
                       float* min) {
        load_groups(w.scale, e, row, first, count, scale);
        if constexpr (kZeros) {
            load_groups(w.zero, e, row, first, count, min);
            for (int64_t g = 0; g < count; ++g) min[g] *= scale[g];
        } else {
            for (int64_t g = 0; g < count; ++g) min[g] = scale[g] * Decoder::kZeroCode;
        }
    }

private:
    static const uint8_t* row_codes(const WeightTensor& w, int64_t e, int64_t row) {
        return w.codes + e * w.expert_bytes + row * w.row_bytes;
    }

    // The codes of columns [k, k + kCodeBytes).
    __attribute__((always_inline)) static VecCodes load(const uint8_t* codes, int64_t k, int64_t columns) {
        const uint8_t* from = codes + k / kCodeBytes * kStep;
        uint8_t last[kStep];
        if (__builtin_expect(k + kCodeBytes > columns, 0)) from = copy_last(from, columns - k, last);
        return Decoder::codes(from);
    }

    // The last bytes of a row may be the last ones there are.
    __attribute__((noinline)) static const uint8_t* copy_last(const uint8_t* from, int64_t columns, uint8_t* last) {
        std::memset(last, 0, kStep);
        if (columns > 0) std::memcpy(last, from, static_cast<size_t>(ceil_div(columns * kStep, kCodeBytes)));
        return last;
    }

    template <int M>
    static void dots_of(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x,
                        const int64_t* index, int64_t m, float* c, int64_t ldc) {
        const int8_t* a[M];
        const float* a_sums[M];
        for (int i = 0; i < M; ++i) a[i] = x.row(index[i < m ? i : 0]), a_sums[i] = x.row_sums(index[i < m ? i : 0]);
        const DotGroups groups(n, w.row_bytes, 4096);
        for (int64_t g = 0; g < groups.count; ++g) {
            const DotRows rows = groups.at(g);
            VecDotsF total[M][kDotRows] = {};
            for_each_piece(0, w.columns, [&](int64_t first, int64_t end) {
                const Piece piece(w, e, row, rows, first, end);
                piece.template take_zeros<M>(a_sums, total);
                piece.template add<M>(a, total);
            });
            VecF sums[M][kDotRows];
            for (int i = 0; i < M; ++i) {
                for (int64_t r = 0; r < kDotRows; ++r) sums[i][r] = in_one_register(total[i][r]);
            }
            put_dots<M>(sums, m, rows,
                        [&](int64_t i, int64_t j, float sum) { c[i * ldc + j] = sum * x.scale[index[i]]; });
        }
    }

    // Columns [first, end), in one piece, of kDotRows rows: as many streams of memory. The last ones may be the same
    // row.
    class Piece {
    public:
        Piece(const WeightTensor& w, int64_t e, int64_t row, const DotRows& rows, int64_t first, int64_t end)
            : w_(w), first_(first), end_(end), group_(first / w.group), groups_((end - 1) / w.group - group_ + 1) {
            const int64_t padded = round_up(groups_, kDotLanes);
            for (int64_t r = 0; r < R; ++r) {
                const int64_t at = row + rows.row(r);
                codes_[r] = row_codes(w, e, at);
                scales(w, e, at, group_, groups_, scale_[r], min_[r]);
                for (int64_t g = groups_; g < padded; ++g) scale_[r][g] = min_[r][g] = 0;
                if (first % w.group) min_[r][0] = 0;  // the piece before has taken it
            }
        }

        template <int M>
        void take_zeros(const float* const* a_sums, VecDotsF (&total)[M][kDotRows]) const {
            for (int64_t g = 0; g < groups_; g += kDotLanes) {
                for (int i = 0; i < M; ++i) {
                    const auto sums = load_bits<VecDotsF>(a_sums[i] + group_ + g);
                    for (int r = 0; r < R; ++r) total[i][r] -= load_bits<VecDotsF>(min_[r] + g) * sums;
                }
            }
        }

        template <int M>
        void add(const int8_t* const* a, VecDotsF (&total)[M][kDotRows]) const {
            if (groups_ == 1 || w_.group % kCodeBytes == 0) {
                for (int64_t g = 0, k = first_; g < groups_; ++g) {
                    const int64_t stop = smaller(end_, (group_ + g + 1) * w_.group);
                    add_codes<M>(a, k, stop, total, [&](int r) { return VecDotsF{} + scale_[r][g]; });
                    k = stop;
                }
            } else if (w_.group == kChunk) {
                for (int64_t k = first_; k < end_; k += kCodeBytes) {
                    add_codes<M>(a, k, k + kCodeBytes, total, [&](int r) {
                        return of_chunks(load_bits<VecDotsF>(scale_[r] + (k - first_) / kChunk), Lanes());
                    });
                }
            } else {  // groups that end within a vector
                for (int64_t k = first_; k < end_; k += kCodeBytes) {
                    add_codes<M>(a, k, k + kCodeBytes, total, [&](int r) {
                        float lanes[kDotLanes];
                        for (int lane = 0; lane < kDotLanes; ++lane) {
                            const int64_t g = (k + lane / (kChunk / 4) * kChunk) / w_.group - group_;
                            lanes[lane] = g < groups_ ? scale_[r][g] : 0;
                        }
                        return load_bits<VecDotsF>(lanes);
                    });
                }
            }
        }

    private:
        static constexpr int R = kDotRows;
        using Lanes = std::make_integer_sequence<int, kDotLanes>;

        // From the scales of one chunk after the other to those of lanes.
        template <int... Is>
        static VecDotsF of_chunks(VecDotsF scales, std::integer_sequence<int, Is...>) {
            return __builtin_shufflevector(scales, scales, (Is * 4 / static_cast<int>(kChunk))...);
        }

        // total += sums over columns [k, stop), a multiple of kCodeBytes but for the last, times scale(r)
        template <int M, class Scale>
        __attribute__((always_inline)) void add_codes(const int8_t* const* a, int64_t k, int64_t stop,
                                                      VecDotsF (&total)[M][kDotRows], Scale scale) const {
            VecDots sums[M][R] = {};
            for (; k < stop; k += kCodeBytes) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    __builtin_prefetch(codes_[r] + k / kCodeBytes * kStep + kReadAhead);
                    const VecCodes q = load(codes_[r], k, w_.columns);
#pragma GCC unroll 4
                    for (int i = 0; i < M; ++i) sums[i][r] = dot4(sums[i][r], q, load_bits<VecCodes>(a[i] + k));
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const VecDotsF factor = scale(r);
#pragma GCC unroll 4
                for (int i = 0; i < M; ++i) total[i][r] += dots_to_floats(sums[i][r]) * factor;
            }
        }

        const WeightTensor& w_;
        int64_t first_, end_, group_, groups_;
        const uint8_t* codes_[R];
        float scale_[R][kPieceGroups + kDotLanes], min_[R][kPieceGroups + kDotLanes];
    };
};

}  // namespace kt::KT_ISA
