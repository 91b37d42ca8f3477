#pragma once

// What kernels need to know of an ISA. dispatch/<isa>.h derives kt::<isa>::Isa from this and states what differs.

#include <cstdint>

namespace kt {

struct IsaDefaults {
    // Bytes of a vector register: 16, 32 or 64.
    static constexpr int kVectorBytes = 16;

    // MicroGemm of float32 and float64: rows of A by panels of B whose sums fit in the registers.
    static constexpr int kGemmRows = 2, kGemmPanels = 1;

    // Whether bfloat16 is multiplied as it is, by a MicroGemm<bfloat16> of the ISA's own; else it is widened to
    // float32.
    static constexpr bool kBFloat16Dot = false;

    // Panels of bfloat16 end with zeros up to a multiple of this many elements of k: a pair, or a tile.
    static constexpr int64_t kBFloat16KMultiple = 2;

    // Up to this many rows of bfloat16, a weight is multiplied where it lies: a panel would not pay for itself.
    static constexpr int64_t kBFloat16DirectRows = 32;

    // MicroDots, products of bytes: rows of activations by panels of codes.
    static constexpr int kCodeGemmRows = 2, kCodeGemmPanels = 1;

    // Whether there are tiles of bytes (TileDots): for activations of two digits.
    static constexpr bool kInt8Tiles = false;

    // Integer formats are multiplied in integers where an expert has up to this many rows on average, or this many
    // columns or more share a scale: where that is faster than in floating point.
    static constexpr int64_t kInt8Rows = 0, kInt8Group = int64_t{1} << 62;

    // What a thread sets up for its work in its constructor and takes down in its destructor.
    struct Region {};
};

}  // namespace kt
