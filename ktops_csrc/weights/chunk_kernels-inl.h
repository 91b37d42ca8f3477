#pragma once

// The kernels of FormatKernels (weights/format_kernels-inl.h) for formats whose blocks are chunks. Columns are walked a
// cache line of codes at a time, group by group, and a scale may be applied to the sum of its group.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formats/decoder-inl.h"
#include "weights/groups-inl.h"

namespace kt::KT_ISA {

// Rows whose chunks are decoded side by side: with few registers, a decoder needs them for itself.
constexpr int kRowsUnrolled = Isa::kVectorBytes > 16 ? kDotRows : 1;

template <class Decoder, Scales kScales, bool kZeros>
class ChunkKernels {
    static constexpr bool kScaled = kScales != Scales::kNone;
    static constexpr bool kEachChunk = kScales == Scales::kExponents;  // has a scale of its own

    // Chunks at a time: those of a cache line.
    static constexpr int kChunks = Isa::kVectorBytes == 64 ? static_cast<int>(larger(1, 64 / Decoder::kBytes)) : 1;

    // Scales are applied to sums of groups instead of weights if registers can hold these beside the sums of rows; and
    // if groups are chunks, to one or two of their sums instead of kChunkVectors of weights.
    static constexpr int kSumRegisters = Isa::kVectorBytes == 64 ? 16 : Isa::kVectorBytes == 32 ? 8 : 0;
    template <int M>
    static constexpr bool kScalesSums = kScaled && (kEachChunk ? M <= 2 : 2 * M * kDotRows <= kSumRegisters);
    template <int M>
    static constexpr bool kByGroup = kScalesSums<M> && !kEachChunk;

    // Scales and zero points of the groups in columns [first, end) of R rows, in one piece.
    template <int R>
    struct Groups {
        static constexpr int64_t kRoom = group_room(kPieceGroups + 1);
        float scale[kScaled ? R : 1][kScaled ? kRoom : 1];
        float zero[kZeros ? R : 1][kZeros ? kRoom : 1];

        void take(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end, int r) {
            if constexpr (kScaled) {
                const int64_t group = first / w.group, n = (end - 1) / w.group - group + 1;
                load_groups(w.scale, e, row, group, n, scale[r], Decoder::kFactor);
                if constexpr (kZeros) load_groups(w.zero, e, row, group, n, zero[r]);
            }
        }
    };

public:
    // Adds columns [first, end), in one piece, of kDotRows rows, each a stream of memory, and prefetches what is
    // `ahead` bytes further. If fewer rows are left, the last one is repeated.
    template <int M>
    __attribute__((always_inline)) static void add_piece(const WeightTensor& w, int64_t e, int64_t row,
                                                         const DotRows& rows, int64_t first, int64_t end,
                                                         const float* const* x, int64_t ahead,
                                                         VecF (&sums)[M][kDotRows]) {
        constexpr int R = static_cast<int>(kDotRows);
        const uint8_t* codes[R];
        Groups<R> groups;
        for (int r = 0; r < R; ++r) {
            codes[r] = w.row(e, row + rows.row(r)) + first / kChunk * Decoder::kBytes;
            groups.take(w, e, row + rows.row(r), first, end, r);
        }
        VecF of_group[M][R] = {};
        auto& to = kByGroup<M> ? of_group : sums;
        const auto add = [&](auto chunks, int64_t k, int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll kRowsUnrolled
            for (int r = 0; r < R; ++r) {
                __builtin_prefetch(codes[r] + ahead);
                add_chunks<M, chunks()>(codes[r], groups, r, x, k, g, to);
                codes[r] += chunks() * Decoder::kBytes;
            }
        };
        const auto add_last = [&](int64_t k, int64_t g) {
            for (int r = 0; r < R; ++r) add_chunks<M, 1>(Last(codes[r], end - k).bytes, groups, r, x, k, g, to);
        };
        const auto end_group = [&](int64_t g) __attribute__((always_inline)) {
            if constexpr (kByGroup<M>) {
#pragma GCC unroll 4
                for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        sums[i][r] += of_group[i][r] * groups.scale[r][g];
                        of_group[i][r] = VecF{};
                    }
                }
            }
        };
        walk(w, first, first, end, add, add_last, end_group);
    }

    // Decodes columns [first, end), in one piece, of a row.
    template <class T>
    static void decode_piece(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end, T* out) {
        const uint8_t* codes = w.row(e, row) + first / kChunk * Decoder::kBytes;
        Groups<1> groups;
        groups.take(w, e, row, first, end, 0);
        const auto put_part = [&](int64_t from, int64_t to, int64_t g) {
            const int64_t k = from / kChunk * kChunk;
            VecF v[kChunkVectors];
            decode<1, true>(Last(codes, smaller(w.columns - k, kChunk)).bytes, groups, 0, g, v);
            store_part<Decoder::kSplit>(v, from - k, to - k, out + from - first);
        };
        const auto put = [&](auto chunks, int64_t k, int64_t g) __attribute__((always_inline)) {
            constexpr int C = chunks();
            VecF v[C * kChunkVectors];
            __builtin_prefetch(codes + kReadAhead);
            decode<C, true>(codes, groups, 0, g, v);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                store_chunk<Decoder::kSplit>(v + c * kChunkVectors, out + k - first + c * kChunk);
            }
            codes += C * Decoder::kBytes;
        };
        const int64_t whole = round_up(first, kChunk);
        if (first < whole) {
            put_part(first, smaller(whole, end), 0);
            codes += Decoder::kBytes;
        }
        if (whole < end) {
            walk(w, first, whole, end, put, [&](int64_t k, int64_t g) { put_part(k, end, g); }, [](int64_t) {});
        }
    }

private:
    static constexpr std::integral_constant<int, 1> kOne{};

    // The last columns of a row, followed by zeros: memory may end with them.
    struct Last {
        uint8_t bytes[Decoder::kBytes] = {};
        Last(const uint8_t* codes, int64_t columns) {
            std::memcpy(bytes, codes, static_cast<size_t>(ceil_div(columns * Decoder::kBytes, kChunk)));
        }
    };

    // Calls f(chunks, k, g) for the chunks of columns [first, end), some at a time, in group g of those from column
    // `origin` on; last(k, g) for what is left of a chunk; and ended(g) at the end of every group of several.
    template <class F, class LastF, class Ended>
    __attribute__((always_inline)) static void walk(const WeightTensor& w, int64_t origin, int64_t first, int64_t end,
                                                    F f, LastF last, Ended ended) {
        const int64_t group = kEachChunk ? kPiece : kScaled ? w.group : kPiece, start = origin / group;
        int64_t k = first, g = first / group - start, next = (first / group + 1) * group;
        for (int64_t stop; k < end; ++g, next = stop + group) {
            stop = smaller(end, next);
            const auto number = [&] { return kEachChunk ? k / kChunk - origin / kChunk : g; };
            if constexpr (kChunks > 1) {
                for (; k + kChunks * kChunk <= stop; k += kChunks * kChunk) {
                    f(std::integral_constant<int, kChunks>(), k, number());
                }
            }
            for (; k + kChunk <= stop; k += kChunk) f(kOne, k, number());
            if (__builtin_expect(k < stop, 0)) {
                last(k, number());
                k = stop;
            }
            ended(g);
        }
    }

    // Adds C chunks of row r from column k on, the first of which is in group g, times rows of x.
    template <int M, int C>
    __attribute__((always_inline)) static void add_chunks(const uint8_t* codes, const Groups<kDotRows>& groups, int r,
                                                          const float* const* x, int64_t k, int64_t g,
                                                          VecF (&sums)[M][kDotRows]) {
        VecF v[C * kChunkVectors];
        decode<C, !kScalesSums<M>>(codes, groups, r, g, v);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const auto products = [&](VecF sum, int c) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int s = c * kChunkVectors; s < (c + 1) * kChunkVectors; ++s) {
                    sum += v[s] * load(x[i] + k + s * kLanes<float>);
                }
                return sum;
            };
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                if constexpr (kScalesSums<M> && kEachChunk) {
                    sums[i][r] += products(VecF{}, c) * groups.scale[r][g + c];
                } else {
                    sums[i][r] = products(sums[i][r], c);
                }
            }
        }
    }

    // Decodes C chunks of row r, the first of which is in group g, and subtracts their zero points.
    template <int C, bool kScale, class G>
    __attribute__((always_inline)) static void decode(const uint8_t* codes, const G& groups, int r, int64_t g,
                                                      VecF* v) {
        if constexpr (Decoder::kDecodesLines && C > 1) {
            Decoder::decode_line(codes, v);
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                Decoder::decode(codes + c * Decoder::kBytes, NoState(), 0, v + c * kChunkVectors);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const int64_t at = kEachChunk ? g + c : g;
            const float scale = kScaled ? groups.scale[kScaled ? r : 0][at] : 1,
                        zero = kZeros ? groups.zero[kZeros ? r : 0][at] : 0;
#pragma GCC unroll 8
            for (int s = c * kChunkVectors; s < (c + 1) * kChunkVectors; ++s) {
                if constexpr (kZeros) v[s] = v[s] - zero;
                if constexpr (kScaled && kScale) v[s] = v[s] * scale;
            }
        }
    }
};

}  // namespace kt::KT_ISA
