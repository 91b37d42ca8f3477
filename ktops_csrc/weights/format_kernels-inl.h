#pragma once

// The kernels that follow from a decoder (formats/decoder-inl.h): rows of weights, and products with few rows, for
// tensors of its format.

#include <cstdint>
#include <cstring>

#include "weights/chunk_dots-inl.h"
#include "weights/codes-inl.h"

namespace kt::KT_ISA {

// Reads the chunks of columns [first, end) of a row, in order. `first` may be in any chunk; all are in one piece.
template <class Decoder, Scales kScales, bool kZeros>
class RowReader {
    static constexpr int64_t kParts = Decoder::kBlock / kChunk;

public:
    void start(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end) {
        const int64_t k = first / kChunk * kChunk;
        columns_ = w.columns;
        block_ = w.row(e, row) + k / Decoder::kBlock * Decoder::kBytes;
        part_ = k / kChunk % kParts;
        if (part_) state_ = Decoder::prepare(block_);
        if constexpr (kScales != Scales::kNone) {
            group_ = w.group;
            index_ = 0;
            const int64_t group = first / group_, n = (end - 1) / group_ - group + 1;
            group_end_ = (group + 1) * group_;
            load_groups(w.scale, e, row, group, n, scales_);
            if constexpr (Decoder::kFactor != 1) {
                for (int64_t i = 0; i < n; ++i) scales_[i] *= Decoder::kFactor;
            }
            if constexpr (kZeros) load_groups(w.zero, e, row, group, n, zeros_);
        }
    }

    // Decodes the next chunk, weights [k, k + 32). Lanes past the last column are any finite number.
    __attribute__((always_inline)) void next(int64_t k, VecF* v) {
        const uint8_t* block = block_;
        if constexpr (kParts == 1) {
            if (__builtin_expect(k + kChunk > columns_, 0)) block = copy_last(k);
        }
        decode(block, k, v);
        if (++part_ == kParts) {
            part_ = 0;
            block_ += Decoder::kBytes;
        }
    }

    // Prefetches the line that is `ahead` bytes past the next chunk.
    __attribute__((always_inline)) void prefetch(int64_t ahead) const {
        __builtin_prefetch(block_ + part_ * (Decoder::kBytes / kParts) + ahead);
    }

private:
    // Copies the last bytes of a row: memory may end with them.
    __attribute__((noinline)) const uint8_t* copy_last(int64_t k) {
        std::memcpy(last_, block_, static_cast<size_t>(ceil_div((columns_ - k) * Decoder::kBytes, kChunk)));
        return last_;
    }

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

    const uint8_t* block_;
    int64_t columns_, group_, group_end_, part_, index_;
    typename Decoder::State state_;
    float scales_[kScales == Scales::kNone ? 1 : group_room(kPieceGroups + 1)];
    float zeros_[kZeros ? group_room(kPieceGroups + 1) : 1];
    uint8_t last_[kParts == 1 ? Decoder::kBytes : 1] = {};
};

template <class Decoder, Scales kScales, bool kZeros>
struct FormatKernels {
    using Reader = RowReader<Decoder, kScales, kZeros>;

    // Decodes rows [row, row + n), columns [column, column + count), to rows `stride` elements apart.
    template <class T>
    static void rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out,
                     int64_t stride) {
        for (int64_t i = row; i < row + n; ++i, out += stride) {
            for_each_piece(column, column + count, [&](int64_t first, int64_t end) {
                Reader reader;
                reader.start(w, e, i, first, end);
                for (int64_t k = first / kChunk * kChunk; k < end; k += kChunk) {
                    VecF v[kChunkVectors];
                    reader.prefetch(kReadAhead);
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
        with_few_rows(m, [&](auto rows) { dots_of<rows()>(w, e, row, n, x, m, c, ldc); });
    }

private:
    template <int M>
    static void dots_of(const WeightTensor& w, int64_t e, int64_t row, int64_t n, const float* const* x, int64_t m,
                        float* c, int64_t ldc) {
        const float* a[M];
        for (int i = 0; i < M; ++i) a[i] = x[i < m ? i : 0];
        const DotOrder order = streams(n, w.row_bytes);
        for (int64_t step = 0; step < order.count; ++step) {
            const DotRows rows = order.at(step);
            const int64_t ahead = read_ahead(order, step, w.row_bytes);
            prefetch_groups(w, e, row, order, step);
            VecF sums[M][kDotRows] = {};
            for_each_piece(0, w.columns, [&](int64_t first, int64_t end) __attribute__((always_inline)) {
                add_piece<M>(w, e, row, rows, first, end, a, ahead, sums);
            });
            put_dots<M>(sums, m, rows, [&](int64_t i, int64_t j, float sum) { c[i * ldc + j] = sum; });
        }
    }

    // Adds columns [first, end), in one piece, of kDotRows rows, each a stream of memory. If fewer rows are left, the
    // last one is repeated.
    template <int M>
    __attribute__((always_inline)) static void add_piece(const WeightTensor& w, int64_t e, int64_t row,
                                                         const DotRows& rows, int64_t first, int64_t end,
                                                         const float* const* x, int64_t ahead,
                                                         VecF (&sums)[M][kDotRows]) {
        if constexpr (Decoder::kBlock == kChunk) {
            ChunkDots<Decoder, kScales, kZeros>::template add_piece<M>(w, e, row, rows, first, end, x, ahead, sums);
        } else {
            constexpr int L = kLanes<float>;
            Reader readers[kDotRows];
            for (int64_t r = 0; r < kDotRows; ++r) readers[r].start(w, e, row + rows.row(r), first, end);
            for (int64_t k = first; k < end; k += kChunk) {
#pragma GCC unroll 4
                for (int64_t r = 0; r < kDotRows; ++r) {
                    VecF v[kChunkVectors];
                    readers[r].prefetch(ahead);
                    readers[r].next(k, v);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                        for (int s = 0; s < kChunkVectors; ++s) sums[i][r] += v[s] * load(x[i] + k + s * L);
                    }
                }
            }
        }
    }
};

}  // namespace kt::KT_ISA
