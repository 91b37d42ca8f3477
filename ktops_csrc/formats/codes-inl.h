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

#include "core/workspace.h"
#include "formats/decoder-inl.h"
#include "formats/groups-inl.h"
#include "isa/direct-inl.h"
#include "isa/dot4-inl.h"
#include "isa/pack-inl.h"

namespace kt::KT_ISA {

// Rows of activations as codes in the order of chunks, zeros up to kCodeMultiple.
struct CodedRows {
    static constexpr int64_t kMultiple = 64;

    int8_t* codes = nullptr;
    int64_t stride = 0;
    float* scale = nullptr;  // of every row
    float* sums = nullptr;   // of every row and group: of its codes; zeros up to sums_stride
    int64_t sums_stride = 0;

    const int8_t* row(int64_t i) const { return codes + i * stride; }
    const float* row_sums(int64_t i) const { return sums + i * sums_stride; }

    static size_t bytes(int64_t rows, const WeightTensor& w) {
        return Workspace::padded<int8_t>(rows * round_up(w.columns, kMultiple)) + Workspace::padded<float>(rows) +
               Workspace::padded<float>(rows * groups_stride(w.columns, w.group));
    }
    static CodedRows take(Workspace& workspace, int64_t rows, const WeightTensor& w) {
        CodedRows out;
        out.stride = round_up(w.columns, kMultiple);
        out.sums_stride = groups_stride(w.columns, w.group);
        out.codes = workspace.take<int8_t>(rows * out.stride);
        out.scale = workspace.take<float>(rows);
        out.sums = workspace.take<float>(rows * out.sums_stride);
        return out;
    }

private:
    static int64_t groups_stride(int64_t columns, int64_t group) {
        return round_up(ceil_div(columns, larger(1, smaller(group, columns))), kDotLanes);
    }
};

// Row i of `rows` from k elements: round(x / scale) with scale = max |x| / 127.
template <class T>
inline void quantize_row(const T* x, int64_t k, int64_t group, bool split, const CodedRows& rows, int64_t i) {
    VecF most{}, invalid{};
    for_each_vector<float>(k, [&](int64_t j, int64_t n) {
        const VecF v = load_n(x + j, n), size = v < VecF{} ? -v : v;
        most = most >= size ? most : size;
        invalid += v * 0.0f;  // NaN if v is, or infinite
    });
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = largest >= most[lane] ? largest : most[lane];
    const float scale = largest / 127 + sum_lanes<float>(invalid), inverse = largest > 0 ? 127 / largest : 0;
    rows.scale[i] = scale;
    int8_t* out = rows.codes + i * rows.stride;
    float* sums = rows.sums + i * rows.sums_stride;
    for (int64_t g = 0; g < rows.sums_stride; ++g) sums[g] = 0;
    for (int64_t j = 0; j < rows.stride; j += kChunk, out += kChunk) {
        float values[kChunk] = {};
        const int64_t count = larger(0, smaller(kChunk, k - j));
        for_each_vector<float>(count,
                               [&](int64_t s, int64_t n) { store_n(values + s, load_n(x + j + s, n) * inverse, n); });
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
        int32_t integers[kChunk], sum = 0;
        for (int s = 0; s < kChunk; s += kLanes<float>) {
            const VecI32 rounded = bit_cast<VecI32>(load(values + s) + kRound) - 0x4b400000;
            std::memcpy(integers + s, &rounded, sizeof(rounded));
        }
        for (int64_t s = 0; s < kChunk; ++s) sum += integers[s];
        for (int64_t s = 0; s < kChunk; ++s) {
            out[s] = static_cast<int8_t>(integers[split ? s % (kChunk / 2) * 2 + s / (kChunk / 2) : s]);
        }
        if (j < k) sums[j / group] += static_cast<float>(sum);
    }
}

template <class Decoder, bool kZeros>
class CodeKernels {
    static constexpr int64_t kStep = Decoder::kCodeStep;

public:
    static constexpr int kFewRows = 4;

    // c[i][j] = x[i] . row (row + j), i < m <= kFewRows, x[i] being row index[i] of `x`.
    static void dots(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                     int64_t m, float* c, int64_t ldc) {
        with_constant<kFewRows>(m, [&](auto rows) { dots_of<rows()>(w, e, row, n, x, index, c, ldc); });
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
        if (__builtin_expect(k + kCodeBytes > columns, 0)) {
            uint8_t last[kStep] = {};
            if (k < columns) {
                std::memcpy(last, from, static_cast<size_t>(ceil_div((columns - k) * kStep, kCodeBytes)));
            }
            return Decoder::codes(last);
        }
        return Decoder::codes(from);
    }

    template <int M>
    struct Sums {
        VecDotsF v[M];
    };

    template <int M>
    static void dots_of(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const CodedRows& x,
                        const int64_t* index, float* c, int64_t ldc) {
        constexpr int kRows = 4;
        const int8_t* a[M];
        const float* sums[M];
        for (int i = 0; i < M; ++i) a[i] = x.row(index[i]), sums[i] = x.row_sums(index[i]);
        for (int64_t j = 0; j < n; j += kRows) {
            const int count = static_cast<int>(smaller(kRows, n - j));
            VecF total[M][kRows] = {};
            for (int r = 0; r < count; ++r) {
                Sums<M> row_sums = {};
                for_each_piece(0, w.columns, [&](int64_t first, int64_t end) {
                    add_piece<M>(w, e, row + j + r, first, end, a, sums, row_sums);
                });
                for (int i = 0; i < M; ++i) total[i][r] = in_one_register(row_sums.v[i]);
            }
            for (int i = 0; i < M; ++i) {
                float out[kRows];
                put_sums<float, kRows>(total[i], out);
                for (int r = 0; r < count; ++r) c[i * ldc + j + r] = out[r] * x.scale[index[i]];
            }
        }
    }

    // Columns [first, end) of one row, which lie in one piece.
    template <int M>
    static void add_piece(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end,
                          const int8_t* const* a, const float* const* a_sums, Sums<M>& total) {
        const uint8_t* codes = row_codes(w, e, row);
        const int64_t group = first / w.group, groups = (end - 1) / w.group - group + 1;
        const bool starts = first % w.group == 0;  // else its sum of activations has been taken
        float scale[kPieceGroups + kDotLanes], min[kPieceGroups + kDotLanes];
        scales(w, e, row, group, groups, scale, min);
        for (int64_t g = groups; g < round_up(groups, kDotLanes); ++g) scale[g] = min[g] = 0;
        if (!starts) min[0] = 0;
        for (int64_t g = 0; g < groups; g += kDotLanes) {
            const VecDotsF mins = load_bits<VecDotsF>(min + g);
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) total.v[i] -= mins * load_bits<VecDotsF>(a_sums[i] + group + g);
        }
        if (groups == 1 || w.group % kCodeBytes == 0) {
            for (int64_t g = 0, k = first; g < groups; ++g) {
                const int64_t stop = smaller(end, (group + g + 1) * w.group);
                VecDots sum[M] = {};
                for (; k < stop; k += kCodeBytes) step<M>(codes, k, w.columns, a, sum);
#pragma GCC unroll 4
                for (int i = 0; i < M; ++i) total.v[i] += dots_to_floats(sum[i]) * scale[g];
            }
            return;
        }
        for (int64_t k = first; k < end; k += kCodeBytes) {  // more than one group in a vector: a scale for every lane
            VecDots sum[M] = {};
            step<M>(codes, k, w.columns, a, sum);
            float lanes[kDotLanes];
            for (int lane = 0; lane < kDotLanes; ++lane) {
                const int64_t g = (k + lane / (kChunk / 4) * kChunk) / w.group - group;
                lanes[lane] = g < groups ? scale[g] : 0;
            }
            const VecDotsF scales = load_bits<VecDotsF>(lanes);
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) total.v[i] += dots_to_floats(sum[i]) * scales;
        }
    }

    template <int M>
    __attribute__((always_inline)) static void step(const uint8_t* codes, int64_t k, int64_t columns,
                                                    const int8_t* const* a, VecDots (&sum)[M]) {
        __builtin_prefetch(codes + k / kCodeBytes * kStep + 1024);
        const VecCodes q = load(codes, k, columns);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) sum[i] = dot4(sum[i], q, load_bits<VecCodes>(a[i] + k));
    }
};

}  // namespace kt::KT_ISA
