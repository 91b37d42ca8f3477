#pragma once

// The limits of this ISA that decide between paths (gemm/path.h).

#include <optional>
#include <type_traits>

#include "gemm/path.h"
#include "isa/bands-inl.h"
#include "isa/direct-inl.h"
#include "isa/micro_gemm_generic-inl.h"
#include "isa/pack_ahead-inl.h"
#include "parallel/profile.h"

namespace kt::KT_ISA {

template <class T>
constexpr IsaLimits isa_limits() {
    using C = Compute<T>;
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    IsaLimits limits{};
    limits.element_bytes = kBytes;
    limits.dots_rows = limits.sums_rows = 32;
    if constexpr (std::is_same_v<T, bfloat16>) limits.dots_rows = limits.sums_rows = Isa::kBFloat16DirectRows;
    if constexpr (std::is_same_v<T, float16>) {
        limits.dots_rows = Isa::kFloat16DotRows;
        limits.sums_rows = Isa::kFloat16SumRows;
    }
    limits.dots_k = kPanelBytes / kBytes / kDotRows;
    limits.sums_columns = kPanelBytes / kBytes / Direct<T>::kRowsAhead;
    limits.band_k = MicroGemm<C>::kReadsRows ? kBandK : 0;
    limits.band_rows = Isa::kDotOnlyRows;
    if constexpr (MicroGemm<C>::kPacksAhead) limits.ahead_k = MicroGemm<C>::Ahead::kStep;
    limits.ahead_columns = kAheadColumns;
    limits.ahead_rows = Isa::kSumOnlyRows;
    limits.decoded_rows = Isa::kDecodedSumRows;
    limits.code_tiles = Isa::kInt8Tiles;
    limits.code_dots_rows = Isa::kCodeDotRows;
    limits.code_rows = Isa::kInt8Rows;
    limits.word_rows = Isa::kWordInt8Rows;
    limits.code_group = Isa::kInt8Group;
    return limits;
}
template <class T>
constexpr IsaLimits kIsaLimits = isa_limits<T>();

// Chooses the path of a block and counts it in the profile.
template <class T>
inline Path take_path(const Product& product, std::optional<Path> forced) {
    static_assert(kNumPaths <= profile::kMaxPaths);
    const Path path = choose_path(product, kIsaLimits<T>, forced);
    profile::count_path(static_cast<int>(path));
    return path;
}

}  // namespace kt::KT_ISA
