#pragma once

// Products with few rows of activations, for formats whose blocks are chunks: every row of W is a run of chunks, so the
// rows read side by side are at the same place of theirs, and a scale is applied to the sum of its group.

#include <cstdint>
#include <cstring>

#include "formats/decoder-inl.h"
#include "weights/groups-inl.h"

namespace kt::KT_ISA {

template <class Decoder, Scales kScales, bool kZeros>
class ChunkDots {
    static constexpr int R = static_cast<int>(kDotRows);
    static constexpr bool kScaled = kScales != Scales::kNone;
    static constexpr int64_t kRoom = group_room(kPieceGroups + 1);

    // Chunks at a time: a cache line of each row.
    static constexpr int kChunks = Isa::kVectorBytes == 64 ? static_cast<int>(larger(1, 64 / Decoder::kBytes)) : 1;

    static constexpr bool kEachChunk = kScales == Scales::kExponents;

    // Registers for sums of groups beside those of rows. Without, every weight is scaled.
    static constexpr int kSumRegisters = Isa::kVectorBytes == 64 ? 16 : 8;

public:
    // Adds columns [first, end), in one piece, of kDotRows rows, each a stream of memory, and prefetches what is
    // `ahead` bytes further. If fewer rows are left, the last one is repeated.
    template <int M>
    __attribute__((always_inline)) static void add_piece(const WeightTensor& w, int64_t e, int64_t row,
                                                         const DotRows& rows, int64_t first, int64_t end,
                                                         const float* const* x, int64_t ahead,
                                                         VecF (&sums)[M][kDotRows]) {
        const uint8_t* codes[R];
        Groups groups;
        for (int r = 0; r < R; ++r) {
            codes[r] = w.row(e, row + rows.row(r)) + first / kChunk * Decoder::kBytes;
            groups.load(w, e, row + rows.row(r), first, end, r);
        }
        const int64_t group = kScaled && !kEachChunk ? w.group : kPiece;
        int64_t k = first, next = (first / group + 1) * group;
        for (int64_t g = 0; k < end; ++g, next += group) {
            VecF of_group[M][R] = {};
            auto& to = kByGroup<M> ? of_group : sums;
            const int64_t stop = smaller(end, next);
            const auto scale_at = [&] { return kEachChunk ? (k - first) / kChunk : g; };
            const auto add = [&](auto chunks) __attribute__((always_inline)) {
                constexpr int C = chunks();
                for (; k + C * kChunk <= stop; k += C * kChunk) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        __builtin_prefetch(codes[r] + ahead);
                        add_chunks<M, C>(codes[r], groups, scale_at(), r, x, k, to);
                        codes[r] += C * Decoder::kBytes;
                    }
                }
            };
            if constexpr (kChunks > 1) add(std::integral_constant<int, kChunks>());
            add(std::integral_constant<int, 1>());
            if (__builtin_expect(k < stop, 0)) {  // the last columns of the rows: memory may end with them
                for (int r = 0; r < R; ++r) {
                    uint8_t last[Decoder::kBytes] = {};
                    std::memcpy(last, codes[r], static_cast<size_t>(ceil_div((stop - k) * Decoder::kBytes, kChunk)));
                    add_chunks<M, 1>(last, groups, scale_at(), r, x, k, to);
                }
                k = stop;
            }
            if constexpr (kByGroup<M>) {
#pragma GCC unroll 4
                for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sums[i][r] += of_group[i][r] * groups.scale[r][g];
                }
            }
        }
    }

private:
    template <int M>
    static constexpr bool kByGroup = kScaled && !kEachChunk && 2 * M * R <= kSumRegisters;

    // Scales and zero points of the groups of R rows in one piece.
    struct Groups {
        float scale[kScaled ? R : 1][kScaled ? kRoom : 1];
        float zero[kZeros ? R : 1][kZeros ? kRoom : 1];

        void load(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t end, int r) {
            if constexpr (kScaled) {
                const int64_t group = first / w.group, n = (end - 1) / w.group - group + 1;
                load_groups(w.scale, e, row, group, n, scale[r]);
                if constexpr (Decoder::kFactor != 1) {
                    for (int64_t i = 0; i < group_room(n); i += kLanes<float>) {
                        store(scale[r] + i, KT_ISA::load(scale[r] + i) * Decoder::kFactor);
                    }
                }
                if constexpr (kZeros) load_groups(w.zero, e, row, group, n, zero[r]);
            }
        }
    };

    // Adds C chunks of row r, starting at column k. g: their group, or that of the first chunk.
    template <int M, int C>
    __attribute__((always_inline)) static void add_chunks(const uint8_t* codes, const Groups& groups, int64_t g, int r,
                                                          const float* const* x, int64_t k, VecF (&sums)[M][R]) {
        constexpr int N = C * kChunkVectors;
        VecF v[N];
        if constexpr (Decoder::kDecodesLines && C > 1) {
            Decoder::decode_line(codes, v);
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                Decoder::decode(codes + c * Decoder::kBytes, NoState(), 0, v + c * kChunkVectors);
            }
        }
#pragma GCC unroll 16
        for (int s = 0; s < N; ++s) {
            const int64_t at = kEachChunk ? g + s / kChunkVectors : g;
            if constexpr (kZeros) v[s] = v[s] - groups.zero[r][at];
            if constexpr (kScaled && !kByGroup<M>) v[s] = v[s] * groups.scale[r][at];
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
            for (int s = 0; s < N; ++s) sums[i][r] += v[s] * load(x[i] + k + s * kLanes<float>);
        }
    }
};

}  // namespace kt::KT_ISA
