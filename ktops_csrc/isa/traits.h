#pragma once

// The traits of an ISA that kernels use. dispatch/<isa>.h derives kt::<isa>::Isa from this and overrides what differs.

#include <cstdint>

namespace kt {

struct FormatTable;

struct IsaDefaults {
    // Bytes of a vector register: 16, 32 or 64.
    static constexpr int kVectorBytes = 16;

    // MicroGemm for float32 and float64: rows of A by panels of B, as many as registers can hold sums for.
    static constexpr int kGemmRows = 2, kGemmPanels = 1;

    // True if the ISA has its own MicroGemm<bfloat16>, which multiplies bfloat16 directly; else bfloat16 is widened to
    // float32.
    static constexpr bool kBFloat16Dot = false;

    // Panels of bfloat16 end with zeros up to a multiple of this many elements of k: a pair, or a tile.
    static constexpr int64_t kBFloat16KMultiple = 2;

    // Up to this many rows of bfloat16, a weight is multiplied in place: a panel would not pay for itself.
    static constexpr int64_t kBFloat16DirectRows = 32;

    // The same for float16: in x W^T, and in x W.
    static constexpr int64_t kFloat16DotRows = 32, kFloat16SumRows = 32;

    // If blocks of a weight are packed ahead, up to this many rows of bfloat16 are sums of its rows; and of the rows of
    // a weight in a format, whose decoding is fastest many rows at a time.
    static constexpr int64_t kSumOnlyRows = 0, kDecodedSumRows = 0;

    // If a weight is multiplied in bands, up to this many rows of bfloat16 are multiplied as dot products.
    // And up to kMostLeftOver rows that do not fill a panel.
    static constexpr int64_t kDotOnlyRows = 0, kMostLeftOver = 0;

    // True if the ISA multiplies bytes and adds the products to 32-bit sums in one instruction.
    static constexpr bool kByteDot = false;

    // MicroDots, products of bytes: rows of activations by panels of codes.
    static constexpr int kCodeGemmRows = 2, kCodeGemmPanels = 1;

    // Up to this many rows of activations, codes are multiplied in place.
    static constexpr int64_t kCodeDotRows = 8;

    // True if the ISA has tiles of bytes (TileDots), for activations of two digits.
    static constexpr bool kInt8Tiles = false;

    static constexpr int64_t kAlways = int64_t{1} << 31;  // more rows than any expert has

    // For weights in integer formats, integer products are faster than floating point if experts have at most kInt8Rows
    // rows on average (kWordInt8Rows if sums of a few products fit in words, isa/dot4-inl.h), or if at least kInt8Group
    // columns share a scale.
    static constexpr int64_t kInt8Rows = 0, kWordInt8Rows = 0, kInt8Group = int64_t{1} << 62;

    // Replaces kernels in the table of every format, if the CPU can do more than the ISA requires.
    static void use_faster_dots(FormatTable*) {}

    // The constructor sets up a thread for its work; the destructor restores it.
    struct Region {};
};

}  // namespace kt
