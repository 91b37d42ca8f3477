#pragma once

// Packing pairs of rows of bfloat16 ahead.

#include <immintrin.h>

#include "isa/pack_ahead-inl.h"
#include "isa/row_pairs_avx512-inl.h"

namespace kt::KT_ISA {

// Packs N groups of two rows, from `group` on.
template <int N>
inline __attribute__((always_inline)) void pack_groups(const PackAhead& p, const PackState& at, int64_t group) {
    const char* w = at.from + group * 64;
    const int64_t stride = p.stride, group_bytes = p.group_bytes;  // read once, as `to` might be anywhere
    char* to = at.to + group * group_bytes;
    __m512i even[N], odd[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        even[i] = _mm512_loadu_si512(w + 64 * i);
        odd[i] = _mm512_loadu_si512(w + stride + 64 * i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, to += group_bytes) {
        __m512i pairs[2];
        interleave_rows(even[i], odd[i], pairs);
        _mm512_store_si512(to, pairs[0]);
        _mm512_store_si512(to + 64, pairs[1]);
    }
}

// Prefetches N lines of two rows.
template <int N>
inline __attribute__((always_inline)) void prefetch_lines(const char* row, int64_t stride) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        __builtin_prefetch(row + 64 * i, 0, 2);
        __builtin_prefetch(row + stride + 64 * i, 0, 2);
    }
}

// Prefetches as many bytes of later rows as belong to the next piece.
inline __attribute__((always_inline)) void prefetch_piece(const PackAhead& p, const PackState& at) {
    if (!at.ahead) return;
    const AheadRows& rows = p.rows;
    const char* ahead = at.ahead + at.group / kPackedGroups * rows.piece_bytes;
    if (rows.piece_bytes > 128) return prefetch_lines<4>(ahead, rows.stride);
    rows.piece_bytes > 64 ? prefetch_lines<2>(ahead, rows.stride) : prefetch_lines<1>(ahead, rows.stride);
}

// Packs the next piece.
inline __attribute__((always_inline)) void pack_piece(PackAhead& p, PackState& at) {
    if (p.groups - at.group >= kPackedGroups) {
        pack_groups<kPackedGroups>(p, at, at.group);
    } else {
        for (int64_t g = at.group; g < p.groups; ++g) pack_groups<1>(p, at, g);
    }
    prefetch_piece(p, at);
    if ((at.group += kPackedGroups) < p.groups) return;
    at.group = 0;
    at.from += 2 * p.stride;
    if (at.from == p.end) at.from = p.begin;
    at.to += 128;
    if (!at.ahead) return;
    at.ahead += 2 * p.rows.stride;
    if ((at.ahead_left -= 2) <= 0) p.next_slab(at);
}

// Packs what is left.
inline void pack_rest(PackAhead& p) {
    p.at.pace.finish([&] { pack_piece(p, p.at); });
}

}  // namespace kt::KT_ISA
