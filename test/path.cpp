// The choice of a path (ktops_csrc/gemm/path.h) at both sides of every threshold, checked by the compiler.

#include "gemm/path.h"

namespace {

using namespace kt;

constexpr int64_t kNever = int64_t{1} << 62;
constexpr int64_t kBytes = 2;
constexpr int64_t kAlways = int64_t{1} << 31;

constexpr IsaLimits with_vectors() {
    IsaLimits isa{};
    isa.element_bytes = kBytes;
    isa.dots_rows = 32, isa.sums_rows = 24;
    isa.dots_k = kPanelBytes / kBytes / 4, isa.sums_columns = kPanelBytes / kBytes / 64;
    isa.code_dots_rows = 8, isa.code_group = kNever;
    return isa;
}
constexpr IsaLimits packing_ahead() {
    IsaLimits isa = with_vectors();
    isa.sums_rows = 32, isa.dots_k = 0;
    isa.ahead_k = 16, isa.ahead_columns = 32;
    isa.ahead_rows = 12, isa.decoded_rows = 16;
    return isa;
}
constexpr IsaLimits with_tiles() {
    IsaLimits isa = with_vectors();
    isa.dots_rows = isa.sums_rows = 12;
    isa.band_k = 32, isa.band_rows = 4;
    isa.code_tiles = true;
    isa.code_rows = isa.word_rows = 8, isa.code_group = 1024;
    return isa;
}
constexpr IsaLimits with_integers() {
    IsaLimits isa = with_vectors();
    isa.code_dots_rows = 4;
    isa.code_rows = 32, isa.word_rows = kAlways;
    return isa;
}
constexpr IsaLimits kVectors = with_vectors(), kPacksAhead = packing_ahead(), kTiles = with_tiles(),
                    kIntegers = with_integers();

constexpr Product forward(int64_t rows, int64_t k = 64) {
    Product p{};
    p.along_rows = p.contiguous = true;
    p.rows = rows, p.k = k, p.columns = p.end = 128;
    return p;
}
constexpr Product backward(int64_t rows, int64_t k = 64) {
    Product p = forward(rows, k);
    p.along_rows = false;
    return p;
}
constexpr Product in_format(Product p) {
    p.contiguous = false, p.has_format = true, p.few_rows = 4;
    return p;
}
constexpr Product strided(Product p, int64_t columns = 128) {
    p.contiguous = false, p.columns = columns;
    return p;
}
constexpr Product ends_at(Product p, int64_t end) {
    p.end = end;
    return p;
}
constexpr Product second(Product p) {
    p.adds = true;
    return p;
}
constexpr Product whole(Product p) {
    p.whole = true;
    return p;
}
constexpr Product with_columns(Product p, int64_t columns) {
    p.columns = columns;
    return p;
}
constexpr Product with(Product p, int64_t added) {
    p.added = added;
    return p;
}
constexpr Product coded(int64_t rows, int digits) {
    Product p = forward(rows);
    p.digits = digits;
    return p;
}

constexpr bool chosen(const Product& p, const IsaLimits& isa, Path path) { return choose_path(p, isa) == path; }

static_assert(chosen(forward(1), kVectors, Path::kDots));
static_assert(chosen(forward(32), kVectors, Path::kDots));
static_assert(chosen(forward(33), kVectors, Path::kPanels));
static_assert(chosen(forward(32, 65536), kVectors, Path::kDots));
static_assert(chosen(forward(32, 65537), kVectors, Path::kPanels));
static_assert(chosen(strided(forward(32)), kVectors, Path::kDots));
static_assert(chosen(second(forward(1)), kVectors, Path::kPanels));

static_assert(chosen(backward(24), kVectors, Path::kColumnSums));
static_assert(chosen(backward(25), kVectors, Path::kPanels));
static_assert(chosen(second(backward(24)), kVectors, Path::kColumnSums));
static_assert(chosen(backward(13), kTiles, Path::kPanels));
static_assert(chosen(strided(backward(1), 4096), kVectors, Path::kColumnSums));
static_assert(chosen(strided(backward(1), 4112), kVectors, Path::kPanels));

static_assert(chosen(whole(backward(12)), kPacksAhead, Path::kColumnSums));
static_assert(chosen(whole(backward(13)), kPacksAhead, Path::kPanelsAhead));
static_assert(chosen(backward(13), kPacksAhead, Path::kColumnSums) && chosen(backward(33), kPacksAhead, Path::kPanels));
static_assert(chosen(whole(backward(33, 72)), kPacksAhead, Path::kPanels));
static_assert(chosen(strided(whole(backward(33))), kPacksAhead, Path::kPanels));
static_assert(chosen(in_format(whole(backward(16))), kPacksAhead, Path::kColumnSums));
static_assert(chosen(in_format(whole(backward(17))), kPacksAhead, Path::kPanelsAhead));
static_assert(chosen(with_columns(whole(backward(33)), 96), kPacksAhead, Path::kPanelsAhead));
static_assert(chosen(with_columns(whole(backward(33)), 112), kPacksAhead, Path::kPanels));

static_assert(chosen(in_format(forward(4)), kVectors, Path::kDecodedDots));
static_assert(chosen(in_format(forward(5)), kVectors, Path::kDots));
static_assert(chosen(in_format(forward(4, 16384)), kVectors, Path::kDecodedDots));
static_assert(chosen(in_format(forward(4, 16385)), kVectors, Path::kDots));
static_assert(chosen(in_format(forward(4)), kTiles, Path::kDecodedDots));
static_assert(chosen(in_format(backward(4)), kVectors, Path::kColumnSums));

static_assert(chosen(forward(4), kTiles, Path::kDots));
static_assert(chosen(forward(5), kTiles, Path::kRowBands));
static_assert(chosen(forward(256), kTiles, Path::kRowBands));
static_assert(chosen(forward(12, 65), kTiles, Path::kDots));
static_assert(chosen(forward(13, 65), kTiles, Path::kPanels));
static_assert(chosen(forward(13, 16320), kTiles, Path::kRowBands));
static_assert(chosen(forward(13, 16352), kTiles, Path::kPanels));
static_assert(chosen(with(forward(13), 1024), kTiles, Path::kRowBands));
static_assert(chosen(with(forward(13), 1025), kTiles, Path::kPanels));
static_assert(chosen(with(forward(13, 15808), 512), kTiles, Path::kRowBands));
static_assert(chosen(with(forward(13, 15840), 512), kTiles, Path::kPanels));
static_assert(chosen(ends_at(forward(13), 16), kTiles, Path::kRowBands));
static_assert(chosen(ends_at(forward(13), 15), kTiles, Path::kPanels));
static_assert(chosen(strided(forward(13)), kTiles, Path::kPanels));
static_assert(chosen(in_format(forward(13, 4064)), kTiles, Path::kRowBands));
static_assert(chosen(in_format(forward(13, 4096)), kTiles, Path::kPanels));

static_assert(chosen(coded(8, 1), kVectors, Path::kCodeDots));
static_assert(chosen(coded(9, 1), kVectors, Path::kCodePanels));
static_assert(chosen(coded(4, 1), kIntegers, Path::kCodeDots));
static_assert(chosen(coded(5, 1), kIntegers, Path::kCodePanels));
static_assert(chosen(coded(8, 2), kTiles, Path::kCodeDots));
static_assert(chosen(coded(9, 2), kTiles, Path::kCodeTiles));
static_assert(chosen(coded(9, 1), kTiles, Path::kCodePanels));

constexpr bool taken(const Product& p, const IsaLimits& isa, Path forced) {
    return choose_path(p, isa, forced) == forced;
}

static_assert(taken(forward(1), kTiles, Path::kRowBands) && taken(forward(256), kTiles, Path::kDots));
static_assert(taken(forward(1), kVectors, Path::kPanels) && taken(backward(256), kVectors, Path::kColumnSums));
static_assert(!taken(forward(256), kVectors, Path::kRowBands) &&
              !taken(in_format(forward(5)), kTiles, Path::kDecodedDots));
static_assert(!taken(forward(1), kTiles, Path::kColumnSums) && !taken(backward(1), kTiles, Path::kDots));
static_assert(!taken(forward(9), kTiles, Path::kCodePanels) && !taken(coded(9, 1), kTiles, Path::kPanels));
static_assert(!taken(coded(9, 1), kTiles, Path::kCodeTiles) && !taken(coded(9, 2), kTiles, Path::kCodePanels));
static_assert(taken(coded(256, 2), kTiles, Path::kCodeDots));
static_assert(!taken(strided(coded(256, 2), 256), kTiles, Path::kCodeDots));

// Digits of a call: `routes` of one expert, `group` columns that share a scale.
constexpr int digits(int64_t routes, int64_t group, const IsaLimits& isa, Computation compute = Computation::kAuto,
                     bool inference = true, std::optional<Path> forced = {}) {
    return choose_digits({compute, inference, routes, 1, false, 4096, group, 128}, isa, forced);
}
constexpr int digits_of_words(int64_t routes, const IsaLimits& isa) {
    return choose_digits({Computation::kAuto, true, routes, 1, true, 4096, 32, 128}, isa);
}

static_assert(digits(1, 128, kVectors) == 0 && digits(1, 128, kVectors, Computation::kInt8) == 1);
static_assert(digits(32, 32, kIntegers) == 1 && digits(1, 32, kIntegers, Computation::kFloat) == 0);
static_assert(digits(33, 4096, kIntegers) == 0 && digits_of_words(2048, kIntegers) == 1);
static_assert(digits_of_words(1, kVectors) == 0 && digits_of_words(9, kTiles) == 0);
static_assert(digits(1, 128, kIntegers, Computation::kAuto, false) == 0);
static_assert(digits(1, 128, kIntegers, Computation::kInt8, false) == 1);
static_assert(digits(8, 128, kTiles) == 1 && digits(9, 128, kTiles) == 0);
static_assert(digits(9, 1023, kTiles) == 0 && digits(9, 1024, kTiles) == 2);
static_assert(digits(9, 128, kTiles, Computation::kInt8) == 2 && digits(8, 128, kTiles, Computation::kInt8) == 1);
static_assert(digits(9, 96, kTiles, Computation::kInt8) == 1 && digits(9, 1152, kTiles, Computation::kInt8) == 1);
static_assert(digits(9, 4096, kTiles, Computation::kInt8) == 2);
static_assert(digits(1, 128, kTiles, Computation::kInt8, false, Path::kCodeTiles) == 2);
static_assert(digits(9, 128, kTiles, Computation::kInt8, false, Path::kCodePanels) == 1);
static_assert(digits(9, 128, kTiles, Computation::kFloat, true, Path::kCodeTiles) == 0);

}  // namespace
