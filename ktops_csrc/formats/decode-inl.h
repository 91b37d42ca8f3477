#pragma once

// What a decoder (formats/plain-inl.h says what that is) makes possible: rows of weights, and products with few rows,
// for tensors of its format. One table of functions for each format.

#include <type_traits>

#include "formats/codes-inl.h"

#define KT_FORMAT_DECODERS
#include "formats/formats.def"
#undef KT_FORMAT_DECODERS

namespace kt::KT_ISA {

// The chunks of a row one after the other, of columns [first, end): `first` in any chunk, but all in one piece.
template <class Decoder, Scales kScales, bool kZeros>
class RowReader {
    static constexpr int64_t kParts = Decoder::kBlock / kChunk;

public:
    RowReader(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end)
        : codes_(w.codes + e * w.expert_bytes + row * w.row_bytes), columns_(w.columns), group_(w.group) {
        const int64_t k = first / kChunk * kChunk;
        block_ = codes_ + k / Decoder::kBlock * Decoder::kBytes;
        part_ = k / kChunk % kParts;
        if (part_) state_ = Decoder::prepare(block_);
        if constexpr (kScales != Scales::kNone) {
            const int64_t group = first / group_, n = (end - 1) / group_ - group + 1;
            group_end_ = (group + 1) * group_;
            load_groups(w.scale, e, row, group, n, scales_);
            if constexpr (Decoder::kFactor != 1) {
                for (int64_t i = 0; i < n; ++i) scales_[i] *= Decoder::kFactor;
            }
            if constexpr (kZeros) load_groups(w.zero, e, row, group, n, zeros_);
        }
    }

    // The next chunk: weights [k, k + 32). Beyond the last column: any finite number.
    __attribute__((always_inline)) void next(int64_t k, VecF* v) {
        if constexpr (kParts == 1) {
            if (__builtin_expect(k + kChunk > columns_, 0)) {  // the last bytes of a row may be the last ones there are
                uint8_t last[Decoder::kBytes] = {};
                std::memcpy(last, block_, static_cast<size_t>(ceil_div((columns_ - k) * Decoder::kBytes, kChunk)));
                return decode(last, k, v);
            }
        }
        __builtin_prefetch(block_ + kAhead);
        decode(block_, k, v);
        if (++part_ == kParts) {
            part_ = 0;
            block_ += Decoder::kBytes;
        }
    }

private:
    static constexpr int64_t kAhead = 1024;  // bytes

    __attribute__((always_inline)) void decode(const uint8_t* block, int64_t k, VecF* v) {
        if (part_ == 0) state_ = Decoder::prepare(block);
        Decoder::decode(block, state_, part_, v);
        if constexpr (kScales != Scales::kNone) {
            if (k >= group_end_) {
                group_end_ += group_;
                ++index_;
            }
            for (int i = 0; i < kChunkVectors; ++i) {
                if constexpr (kZeros) v[i] = v[i] - zeros_[index_];
                v[i] = v[i] * scales_[index_];
            }
        }
    }

    const uint8_t* codes_;
    const uint8_t* block_;
    int64_t columns_, group_, group_end_ = 0, part_ = 0, index_ = 0;
    typename Decoder::State state_;
    float scales_[kScales == Scales::kNone ? 1 : kPieceGroups + 1];
    float zeros_[kZeros ? kPieceGroups + 1 : 1];
};

template <class Decoder, Scales kScales, bool kZeros>
struct FormatKernels {
    using Reader = RowReader<Decoder, kScales, kZeros>;

    // Rows [row, row + n), columns [column, column + count), `stride` elements apart.
    template <class T>
    static void rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out,
                     int64_t stride) {
        for (int64_t i = row; i < row + n; ++i, out += stride) {
            for_each_piece(column, column + count, [&](int64_t first, int64_t end) {
                Reader reader(w, e, i, first, end);
                for (int64_t k = first / kChunk * kChunk; k < end; k += kChunk) {
                    VecF v[kChunkVectors];
                    reader.next(k, v);
                    if (__builtin_expect(k >= first && k + kChunk <= end, 1)) {
                        store_chunk<Decoder::kSplit>(v, out + k - column);
                        continue;
                    }
                    T part[kChunk];
                    store_chunk<Decoder::kSplit>(v, part);
                    const int64_t from = larger(first, k), to = smaller(end, k + kChunk);
                    std::memcpy(static_cast<void*>(out + from - column), part + from - k,
                                static_cast<size_t>(to - from) * sizeof(T));
                }
            });
        }
    }

    // c[i][j] = x[i] . row (row + j), i < m <= kFewRows. Rows of x are float32 in the order of chunks (order()), with
    // zeros up to a whole chunk.
    static void dots(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const float* const* x, int64_t m,
                     float* c, int64_t ldc) {
        with_constant<kFewRows>(m, [&](auto rows) { dots_of<rows()>(w, e, row, n, x, c, ldc); });
    }

    static constexpr int kFewRows = KT_VECTOR_BYTES == 64 ? 4 : 2;

private:
    // A chunk has 2, 4 or 8 vectors; they are added up in two sums, and chunks of even and of odd number apart where
    // there are registers for it.
    template <int M>
    static void dots_of(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const float* const* x, float* c,
                        int64_t ldc) {
        constexpr int kSums = 2, kUnroll = M == 1 ? 2 : 1, L = kLanes<float>;
        for (int64_t j = 0; j < n; ++j) {
            VecF sums[kUnroll][M][kSums] = {};
            for_each_piece(0, w.columns, [&](int64_t first, int64_t end) __attribute__((always_inline)) {
                Reader reader(w, e, row + j, first, end);
                const auto step = [&](int64_t k, VecF(&to)[M][kSums]) __attribute__((always_inline)) {
                    VecF v[kChunkVectors];
                    reader.next(k, v);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                        for (int s = 0; s < kChunkVectors; ++s) to[i][s % kSums] += v[s] * load(x[i] + k + s * L);
                    }
                };
                int64_t k = first;
                for (; k + kUnroll * kChunk <= end; k += kUnroll * kChunk) {
#pragma GCC unroll 2
                    for (int u = 0; u < kUnroll; ++u) step(k + u * kChunk, sums[u]);
                }
                for (; k < end; k += kChunk) step(k, sums[0]);
            });
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                VecF total = sums[0][i][0] + sums[0][i][1];
                if constexpr (kUnroll > 1) total += sums[1][i][0] + sums[1][i][1];
                c[i * ldc + j] = sum_lanes<float>(total);
            }
        }
    }
};

// What the kernels of a layer need of a format, without its type.
struct FormatTable {
    template <class T>
    using Rows = void (*)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out,
                          int64_t stride);
    Rows<float> rows_float;
    Rows<double> rows_double;
    Rows<bfloat16> rows_bfloat16;
    void (*dots)(const WeightTensor&, int64_t e, int64_t row, int64_t n, const float* const* x, int64_t m, float* c,
                 int64_t ldc);
    int64_t few_rows;
    bool split;

    // Of integer formats: functions of CodeKernels, null for others.
    void (*code_dots)(const WeightTensor&, int64_t e, int64_t row, int64_t n, const CodedRows& x, const int64_t* index,
                      int64_t m, float* c, int64_t ldc);
    void (*code_panel)(const WeightTensor&, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* rows,
                       uint8_t* panel);
    void (*code_scales)(const WeightTensor&, int64_t e, int64_t row, int64_t first, int64_t count, float* scale,
                        float* min);

    template <class T>
    Rows<T> rows() const {
        if constexpr (std::is_same_v<T, float>) return rows_float;
        if constexpr (std::is_same_v<T, double>) return rows_double;
        if constexpr (std::is_same_v<T, bfloat16>) return rows_bfloat16;
    }
};

template <class Decoder, Scales kScales, bool kZeros, bool kIntegers>
constexpr FormatTable format_table() {
    using Kernels = FormatKernels<Decoder, kScales, kZeros>;
    FormatTable table{&Kernels::template rows<float>,
                      &Kernels::template rows<double>,
                      &Kernels::template rows<bfloat16>,
                      &Kernels::dots,
                      Kernels::kFewRows,
                      Decoder::kSplit,
                      nullptr,
                      nullptr,
                      nullptr};
    if constexpr (kIntegers) {
        using Codes = CodeKernels<Decoder, kZeros>;
        table.code_dots = &Codes::dots;
        table.code_panel = &Codes::panel;
        table.code_scales = &Codes::scales;
    }
    return table;
}

constexpr FormatTable kFormatTables[] = {
#define KT_FORMAT(name, Type, element, block, bytes, scales, zeros, integers) \
    format_table<Type, Scales::scales, zeros, integers>(),
#include "formats/formats.def"
#undef KT_FORMAT
};

// Columns 32 c + .. of a row of x as chunks have them: k elements, zeros up to a whole chunk.
template <class T>
inline void order(const T* x, int64_t k, bool split, float* out) {
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
        float part[kChunk] = {};
        const int64_t n = smaller(kChunk, k - i);
        for_each_vector<float>(n,
                               [&](int64_t j, int64_t count) { store_n(part + j, load_n(x + i + j, count), count); });
        for (int64_t j = 0; j < kChunk; ++j) out[j] = split ? part[j % (kChunk / 2) * 2 + j / (kChunk / 2)] : part[j];
    }
}

// Rows of any float32 weights as float32: kt::dequantize.
inline void decode_rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, float* out) {
    kFormatTables[static_cast<int>(w.format)].rows_float(w, e, row, n, 0, w.columns, out, w.columns);
}

}  // namespace kt::KT_ISA
