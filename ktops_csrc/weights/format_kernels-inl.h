#pragma once

// The kernels that follow from a decoder (formats/decoder-inl.h): rows of weights, and products with few rows, for
// tensors of its format.

#include <cstdint>
#include <cstring>

#include "weights/chunk_kernels-inl.h"
#include "weights/codes-inl.h"

namespace kt::KT_ISA {

// Reads the chunks of a row in order, for formats with several in a block, whose rows are whole blocks.
template <class Decoder>
class BlockReader {
    static constexpr int64_t kParts = Decoder::kBlock / kChunk;

public:
    // From the chunk that starts at column k on.
    void start(const WeightTensor& w, int64_t e, int64_t row, int64_t k) {
        block_ = w.row(e, row) + k / Decoder::kBlock * Decoder::kBytes;
        part_ = k / kChunk % kParts;
        if (part_) state_ = Decoder::prepare(block_);
    }

    __attribute__((always_inline)) void next(VecF* v) {
        if (part_ == 0) state_ = Decoder::prepare(block_);
        Decoder::decode(block_, state_, part_, v);
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
    const uint8_t* block_;
    int64_t part_;
    typename Decoder::State state_;
};

template <class Decoder, Scales kScales, bool kZeros>
struct FormatKernels {
    static constexpr bool kInChunks = Decoder::kBlock == kChunk;
    static_assert(kInChunks || kScales == Scales::kNone);
    using Chunks = ChunkKernels<Decoder, kScales, kZeros>;

    // Decodes rows [row, row + n), columns [column, column + count), to rows `stride` elements apart.
    template <class T>
    static void rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out,
                     int64_t stride) {
        for (int64_t i = row; i < row + n; ++i, out += stride) {
            for_each_piece(column, column + count, [&](int64_t first, int64_t end) {
                if constexpr (kInChunks) {
                    Chunks::decode_piece(w, e, i, first, end, out + first - column);
                } else {
                    decode_piece(w, e, i, first, end, out + first - column);
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
                if constexpr (kInChunks) {
                    Chunks::template add_piece<M>(w, e, row, rows, first, end, a, ahead, sums);
                } else {
                    add_piece<M>(w, e, row, rows, first, end, a, ahead, sums);
                }
            });
            put_dots<M>(sums, m, rows, [&](int64_t i, int64_t j, float sum) { c[i * ldc + j] = sum; });
        }
    }

    // As in ChunkKernels.
    template <class T>
    static void decode_piece(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end, T* out) {
        BlockReader<Decoder> reader;
        reader.start(w, e, row, first);
        for (int64_t k = first / kChunk * kChunk; k < end; k += kChunk) {
            VecF v[kChunkVectors];
            reader.prefetch(kReadAhead);
            reader.next(v);
            const int64_t from = larger(first, k), to = smaller(end, k + kChunk);
            if (__builtin_expect(to - from == kChunk, 1)) {
                store_chunk<Decoder::kSplit>(v, out + k - first);
            } else {
                store_part<Decoder::kSplit>(v, from - k, to - k, out + from - first);
            }
        }
    }

    template <int M>
    __attribute__((always_inline)) static void add_piece(const WeightTensor& w, int64_t e, int64_t row,
                                                         const DotRows& rows, int64_t first, int64_t end,
                                                         const float* const* x, int64_t ahead,
                                                         VecF (&sums)[M][kDotRows]) {
        BlockReader<Decoder> readers[kDotRows];
        for (int64_t r = 0; r < kDotRows; ++r) readers[r].start(w, e, row + rows.row(r), first);
        for (int64_t k = first; k < end; k += kChunk) {
#pragma GCC unroll 4
            for (int64_t r = 0; r < kDotRows; ++r) {
                VecF v[kChunkVectors];
                readers[r].prefetch(ahead);
                readers[r].next(v);
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
                    for (int s = 0; s < kChunkVectors; ++s) {
                        sums[i][r] += v[s] * load(x[i] + k + s * kLanes<float>);
                    }
                }
            }
        }
    }
};

}  // namespace kt::KT_ISA
