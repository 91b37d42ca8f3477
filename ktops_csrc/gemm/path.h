#pragma once

// The paths of a product of activations with a weight: what each requires, when it wins, and which one is chosen. Only
// this file decides; the rest of gemm/ computes.
//
//   x W^T   along the rows of W: forward
//   x W     down the rows of W: the gradients of activations in backward
//
// W is the matrix in memory, whose rows are contiguous. If a weight is transposed, W is its transpose: forward computes
// x W, and backward x W^T.
//
// The path is chosen once per block of C (rows of one expert by columns of one task). Whether a weight is multiplied in
// integers is chosen once per call. LoRA factors, whose products are added to those of W, and weight gradients always
// use panels.

#include <cstdint>
#include <optional>

#include "core/views.h"

namespace kt {

// In order of preference: the first path that is possible and wins is chosen.
enum class Path : uint8_t {
    // x W^T, W in a format: float32 dot products with each weight as it is decoded, without storing it. Wins up to the
    // number of rows whose sums fit in registers; with more, W would be decoded twice. (Decision 9)
    kDecodedDots,
    // x W^T for bfloat16 on a CPU that multiplies it: bands of rows of W, in place or after decoding, and x in panels.
    // W is not transposed and read ahead evenly, so this beats panels with any number of rows, and dots with more than
    // a few. (Decisions 7 and 29)
    kRowBands,
    // x W^T: dot products with rows of W in place, or with copies of rows that aren't contiguous. Wins while a panel
    // would be used too rarely to pay for itself. (Decision 6)
    kDots,
    // x W for bfloat16 on a CPU that multiplies it: the next block of W is packed while one is multiplied. Beats panels
    // with any number of rows, and sums of rows with more than fit in registers at once. (Decisions 29 and 30)
    kPanelsAhead,
    // x W: sums of rows of W, each times an element of x. Wins when dots do. (Decision 6)
    kColumnSums,
    // x W^T and x W: blocks of W sized for L2 are packed into panels, which every row of x uses. Wins with many rows;
    // handles any strides, formats and sizes. (Decision 2)
    kPanels,
    // x W^T in integers: dot products with codes in place. Wins with few rows, for which codes would be used too rarely
    // in panels or tiles. (Decision 12)
    kCodeDots,
    // x W^T in integers on a CPU with tiles of bytes: codes are decoded into rows of bytes, and x is packed into panels
    // as two digits, since sums in tiles cannot be scaled block by block. Wins with many rows. (Decision 10)
    kCodeTiles,
    // x W^T in integers: codes in panels; each block of activations has its own scale. Wins with many rows on a CPU
    // without tiles of bytes, or when the groups of W don't fill them. (Decisions 10 and 13)
    kCodePanels,
};
constexpr const char* kPathNames[] = {"decoded_dots", "row_bands", "dots",       "panels_ahead", "column_sums",
                                      "panels",       "code_dots", "code_tiles", "code_panels"};
constexpr int kNumPaths = static_cast<int>(Path::kCodePanels) + 1;
static_assert(sizeof(kPathNames) / sizeof(kPathNames[0]) == kNumPaths);

// A block of C has at most kMaxRows rows and kMaxColumns columns; or fewer rows, in steps of kRowStep, and more
// columns, up to kWideColumns, with no more elements. kMaxK: the most elements of the inner dimension in panels at
// once.
constexpr int64_t kMaxRows = 256, kMaxColumns = 256, kWideColumns = 2048, kMaxK = 2048;
constexpr int64_t kRowStep = 32;  // a micro-kernel may write this many rows even if it computes fewer

// A thread's scratch memory for panels, sized for L2, and for rows of weights or activations.
constexpr int64_t kPanelBytes = 512 << 10, kRowBytes = kPanelBytes / 2;

// Panels of x for kRowBands. With 2 MiB of L2, two bands fit beside them; with 1 MiB, if x has as many rows as usual.
// kBandRank: the largest inner dimension of a product added in the same pass.
constexpr int64_t kBandBytes = 1 << 20, kBandRank = 1024;

// What the kernels of an ISA support for activations of a dtype, and the sizes where one path overtakes another.
struct IsaLimits {
    int64_t element_bytes;   // of the dtype
    int64_t dots_rows;       // up to this many rows, kDots beats kPanels
    int64_t sums_rows;       // up to this many, kColumnSums does
    int64_t dots_k;          // kDots: the longest rows of W of which kDotRows copies fit in scratch
    int64_t sums_columns;    // kColumnSums: the most columns of which copies of the rows read at once fit in scratch
    int64_t band_k;          // kRowBands: columns of W are a multiple of this; 0: no bands
    int64_t band_rows;       // with more than this many rows, kRowBands beats kDots
    int64_t ahead_k;         // kPanelsAhead: rows of W are a multiple of this; 0: not available
    int64_t ahead_columns;   // and so are its columns
    int64_t ahead_rows;      // with more than this many rows, kPanelsAhead beats kColumnSums
    int64_t decoded_rows;    // the same if W is in a format
    bool code_tiles;         // has tiles of bytes
    int64_t code_dots_rows;  // up to this many rows, kCodeDots beats panels and tiles
    int64_t code_rows;       // integers are faster than floats up to this many rows per expert on average,
    int64_t word_rows;       // or up to this many if sums of a few products fit in words,
    int64_t code_group;      // and for any number of rows if at least this many columns share a scale
};

// The product computed for a block of C.
struct Product {
    bool along_rows;        // x W^T, else x W
    int64_t rows, columns;  // of C; columns in whole panels, both halves of gate_up
    int64_t k;
    bool adds;         // to a product already in C, as LoRA's is added to that of the base weight
    bool whole;        // kPanelsAhead: the caller has all rows and columns, not a block of them
    int64_t added;     // kRowBands: the inner dimension of a product that is added in the same pass
    int64_t end;       // x W^T: end of the block's rows of W (of its first range, if it has two)
    bool contiguous;   // rows of W are contiguous and in the dtype of x
    bool has_format;   // W is in a format
    int64_t few_rows;  // most rows of x for kDecodedDots; 0: not available
    int digits;        // of activations rounded to integers; 0: floats
};

constexpr bool is_possible(Path path, const Product& p, const IsaLimits& isa) {
    switch (path) {
        case Path::kDecodedDots:  // rows of x in float32, padded to whole chunks of 32 columns, must fit in scratch
            return !p.digits && p.along_rows && !p.adds && p.rows <= p.few_rows &&
                   p.rows * round_up(p.k, 32) * 4 <= kRowBytes;
        case Path::kRowBands: {
            if (p.digits || !p.along_rows || p.adds || !isa.band_k || p.k % isa.band_k || p.end < 16) return false;
            const bool decodes = p.has_format && kRowStep * (p.k * isa.element_bytes + 64) <= kRowBytes;
            const bool fits = kRowStep * (p.k + 64 + p.added) * isa.element_bytes <= kBandBytes;
            return fits && p.added <= kBandRank && (p.contiguous || decodes);
        }
        case Path::kDots:
            return !p.digits && p.along_rows && !p.adds && p.k <= isa.dots_k;
        case Path::kPanelsAhead:
            return !p.digits && !p.along_rows && p.whole && (p.contiguous || p.has_format) && isa.ahead_k &&
                   p.k % isa.ahead_k == 0 && p.columns % isa.ahead_columns == 0;
        case Path::kColumnSums:
            return !p.digits && !p.along_rows && (p.contiguous || p.columns <= isa.sums_columns);
        case Path::kPanels:
            return !p.digits;
        case Path::kCodeDots:  // one row of C per digit
            return p.digits && (p.digits == 1 || p.digits * p.rows * p.columns <= kMaxRows * kMaxColumns);
        case Path::kCodeTiles:
            return p.digits == 2;
        case Path::kCodePanels:
            return p.digits == 1;
    }
    return false;
}

// True if a possible path beats those after it.
constexpr bool wins(Path path, const Product& p, const IsaLimits& isa) {
    switch (path) {
        case Path::kRowBands:
            return p.rows > isa.band_rows;
        case Path::kDots:
            return p.rows <= isa.dots_rows;
        case Path::kPanelsAhead:
            return p.rows > (p.has_format ? isa.decoded_rows : isa.ahead_rows);
        case Path::kColumnSums:
            return p.rows <= isa.sums_rows;
        case Path::kCodeDots:
            return p.rows <= isa.code_dots_rows;
        default:
            return true;
    }
}

// forced: a path that a test requests, chosen wherever it is possible.
constexpr Path choose_path(const Product& product, const IsaLimits& isa, std::optional<Path> forced = {}) {
    if (forced && is_possible(*forced, product, isa)) return *forced;
    int path = 0;
    while (!is_possible(Path(path), product, isa) || !wins(Path(path), product, isa)) ++path;
    return Path(path);
}

// The arithmetic of products with weights. kInt8 rounds the activations to integers; kAuto chooses the faster.
enum class Computation { kAuto, kFloat, kInt8 };

// The products of a call with one weight of an integer format.
struct IntegerProducts {
    Computation compute;
    bool inference;  // no gradient will be requested
    int64_t routes, experts;
    bool words;           // sums of a few products fit in words
    int64_t columns;      // of W
    int64_t group, unit;  // columns that share a scale; that are decoded together
};

// Returns the number of digits per activation in these products, 0 for floats. kCodeTiles takes two and requires groups
// that are whole rows or whole units.
constexpr int choose_digits(const IntegerProducts& p, const IsaLimits& isa, std::optional<Path> forced = {}) {
    const bool many = p.routes > (p.words ? isa.word_rows : isa.code_rows) * p.experts;
    const bool faster = p.inference && (!many || p.group >= isa.code_group);
    if (p.compute == Computation::kAuto ? !faster : p.compute == Computation::kFloat) return 0;
    const bool fill_tiles = p.group >= p.columns || (p.group % p.unit == 0 && p.group <= kMaxK / 2);
    if (!isa.code_tiles || !fill_tiles || forced == Path::kCodePanels) return 1;
    return many || forced == Path::kCodeTiles ? 2 : 1;
}

}  // namespace kt
