#pragma once

// What decides the paths of products (gemm/path.h) on this row of kernels.

#include "gemm/path.h"
#include "isa/direct-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "parallel/profile.h"

namespace kt::KT_ISA {

#ifndef KT_BFLOAT16_DIRECT_ROWS
#define KT_BFLOAT16_DIRECT_ROWS 32
#endif
#ifndef KT_CODE_ROWS
#define KT_CODE_ROWS 0
#endif
#ifndef KT_CODE_GROUP
#define KT_CODE_GROUP (int64_t{1} << 62)
#endif
#ifdef KT_INT8_TILES
constexpr bool kHasCodeTiles = true;
#else
constexpr bool kHasCodeTiles = false;
#endif

template <class T>
constexpr IsaLimits isa_limits() {
    using C = Compute<T>;
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    IsaLimits limits{};
    limits.element_bytes = kBytes;
    limits.direct_rows = std::is_same_v<T, bfloat16> ? KT_BFLOAT16_DIRECT_ROWS : 32;
    limits.dots_k = kPanelBytes / kBytes / kDotRows;
    limits.sums_columns = kPanelBytes / kBytes / Direct<T>::kRowsAhead;
    limits.tile_k = MicroGemm<C>::kReadsRows ? kKMultiple<C> : 0;
    limits.code_tiles = kHasCodeTiles;
    limits.code_rows = KT_CODE_ROWS;
    limits.code_group = KT_CODE_GROUP;
    return limits;
}
template <class T>
constexpr IsaLimits kIsaLimits = isa_limits<T>();

// The path that a block takes; profiles count it.
template <class T>
inline Path take_path(const Product& product, std::optional<Path> forced) {
    static_assert(kNumPaths <= profile::kMaxPaths);
    const Path path = choose_path(product, kIsaLimits<T>, forced);
    profile::count_path(static_cast<int>(path));
    return path;
}

}  // namespace kt::KT_ISA
