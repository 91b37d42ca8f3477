#pragma once

// Rounds rows of activations to codes (CodedRows): blocks of 32 columns to integers up to 127, with a scale per block;
// or, with two digits, whole rows to integers up to 127 * 128 = 128 high + low.

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa/chunk-inl.h"
#include "isa/direct-inl.h"
#include "weights/format_table.h"

namespace kt::KT_ISA {

// The vectors, blocks and halves of blocks of a unit.
constexpr int kUnitVectors = static_cast<int>(CodedRows::kUnit) / kLanes<float>;
constexpr int kUnitBlocks = static_cast<int>(CodedRows::kUnit / CodedRows::kBlock);
constexpr int kUnitHalves = 2 * kUnitBlocks;
static_assert(kUnitBlocks == 4);

// Loads x[0 .. n), and zeros up to a unit.
template <class T>
inline void load_unit(const T* x, int64_t n, VecF* v) {
    constexpr int64_t L = kLanes<float>;
    for (int i = 0; i < kUnitVectors; ++i) {
        const int64_t left = n - i * L;
        v[i] = left >= L ? load(x + i * L) : left > 0 ? load_partial(x + i * L, left) : VecF{};
    }
}

// The bits of |x|. Compared as integers, they have the order of the numbers, with NaN last.
inline VecI32 magnitude(VecF x) { return bit_cast<VecI32>(x) & 0x7fffffff; }

// The largest magnitude as a float; NaN if it is infinite or NaN.
inline float finite_or_nan(int32_t magnitude) {
    return bit_cast<float>(magnitude < 0x7f800000 ? magnitude : 0x7fc00000);
}

// The largest |x| of each block.
inline void largest_of_blocks(const VecF* v, float* out) {
    constexpr int N = kUnitVectors / kUnitBlocks;
    VecI32 most[kUnitBlocks];
    for (int b = 0; b < kUnitBlocks; ++b) {
        most[b] = magnitude(v[b * N]);
        for (int i = 1; i < N; ++i) most[b] = Larger()(most[b], magnitude(v[b * N + i]));
    }
    int32_t largest[kUnitBlocks];
    put_folded(most, Larger(), largest);
    for (int b = 0; b < kUnitBlocks; ++b) out[b] = finite_or_nan(largest[b]);
}

// The largest |x| of k elements.
template <class T>
inline float largest_of(const T* x, int64_t k) {
    VecI32 most[kUnitBlocks] = {};
    for (int64_t j = 0; j < k; j += CodedRows::kUnit) {
        VecF v[kUnitVectors];
        load_unit(x + j, k - j, v);
        for (int i = 0; i < kUnitVectors; ++i) {
            most[i % kUnitBlocks] = Larger()(most[i % kUnitBlocks], magnitude(v[i]));
        }
    }
    int32_t largest[kUnitBlocks], all = 0;
    put_folded(most, Larger(), largest);
    for (int32_t one : largest) all = larger(all, one);
    return finite_or_nan(all);
}

// steps / largest, or 0 if that is infinite.
inline float inverse_of(float largest, float steps) { return largest * 3e38f > steps ? steps / largest : 0; }

inline VecI32 nearest_integers(VecF x, float factor) {
    VecF v = x * factor;
    __asm__("" : "+x"(v));  // no fused multiply-add: the product must be rounded to float32 first
    return bit_cast<VecI32>(v + kRound) - kRoundBits;
}

// The even or the odd elements of two vectors.
template <int kOdd, int... Is>
inline VecI32 every_second(VecI32 a, VecI32 b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, (2 * Is + kOdd)...);
}

inline void store_bytes(VecI32 x, int8_t* out) {
    const auto bytes = __builtin_convertvector(x, VecI8);
    std::memcpy(out, &bytes, sizeof(bytes));
}

// Stores the codes of a unit, in order or as pairs.
inline void store_unit(const VecI32* q, bool pairs, int8_t* out) {
    constexpr int L = kLanes<float>;
    for (int i = 0; i < kUnitVectors; i += 2) {
        if (pairs) {
            store_bytes(every_second<0>(q[i], q[i + 1], std::make_integer_sequence<int, L>()), out + i * L / 2);
            store_bytes(every_second<1>(q[i], q[i + 1], std::make_integer_sequence<int, L>()),
                        out + CodedRows::kUnit / 2 + i * L / 2);
        } else {
            store_bytes(q[i], out + i * L);
            store_bytes(q[i + 1], out + (i + 1) * L);
        }
    }
}

// Writes a row of CodedRows unit by unit: its codes, scales, starts and sums.
class CodedRow {
public:
    CodedRow(const CodedRows& rows, int64_t i)
        : rows_(rows),
          codes_(rows.codes + i * rows.stride),
          scales_(rows.row_scales(i)),
          starts_(rows.row_starts(i)),
          joined_(rows.row_joined(i)),
          sums_(rows.row_sums(i)),
          end_(sums_ + rows.num_sums),
          group_end_(rows.group) {}

    void add_unit(const VecI32* q, const float* scale, bool joined) {
        *joined_++ = joined;
        store_unit(q, rows_.pairs, codes_);
        codes_ += CodedRows::kUnit;
        constexpr int N = kUnitVectors / kUnitHalves;
        VecI32 halves[kUnitHalves];
        for (int h = 0; h < kUnitHalves; ++h) {
            halves[h] = q[h * N];
            for (int i = 1; i < N; ++i) halves[h] += q[h * N + i];
        }
        int32_t sums[kUnitHalves];
        for (int h = 0; h < kUnitHalves; h += 4) {
            const VecI32 four[] = {halves[h], halves[h + 1], halves[h + 2], halves[h + 3]};
            put_folded(four, Plus(), sums + h);
        }
        for (int b = 0; b < kUnitBlocks; ++b) {
            *scales_++ = scale[b];
            if (rows_.part == CodedRows::kBlock) {
                add_part(sums[2 * b] + sums[2 * b + 1], scale[b]);
            } else {
                add_part(sums[2 * b], scale[b]);
                add_part(sums[2 * b + 1], scale[b]);
            }
        }
    }

    // Writes the sum of a last, incomplete group, and zeros after it.
    void finish() {
        if (k_ > group_end_ - rows_.group) *sums_++ = sum_;
        while (sums_ < end_) *sums_++ = 0;
    }

private:
    void add_part(int32_t sum, float scale) {
        *starts_++ = -rows_.zero_code * sum;
        sum_ += scale * static_cast<float>(sum);
        k_ += rows_.part;
        if (k_ == group_end_) {
            if (sums_ < end_) *sums_++ = sum_;
            group_end_ += rows_.group;
            sum_ = 0;
        }
    }

    const CodedRows& rows_;
    int8_t* codes_;
    float* scales_;
    int32_t* starts_;
    int8_t* joined_;
    float *sums_, *const end_;
    int64_t k_ = 0, group_end_;
    float sum_ = 0;  // of the group that ends at group_end_
};

// The blocks of a unit share the largest of their scales if the sum of the squares of the scales, and with it that of
// the squared errors, grows by a factor of at most `most`.
struct JoinedUnit {
    float largest = 0, squares = 0;

    explicit JoinedUnit(const float* blocks) {
        for (int b = 0; b < kUnitBlocks; ++b) {
            largest = blocks[b] > largest ? blocks[b] : largest;
            squares += blocks[b] * blocks[b];
        }
    }
    float joined_squares() const { return kUnitBlocks * largest * largest; }
    bool joins(float most) const { return joined_squares() <= most * squares; }
};

// Returns `most` for a row whose blocks have these largest |x|: kMostJoinedSquares if the sum of all squares then grows
// by a factor of at most kJoinedSquares, else kJoinedSquares.
constexpr float kJoinedSquares = 1.6f, kMostJoinedSquares = 2.4f;
inline float most_joined_squares(const float* blocks, int64_t units) {
    float before = 0, after = 0;
    for (int64_t u = 0; u < units; ++u) {
        const JoinedUnit unit(blocks + u * kUnitBlocks);
        before += unit.squares;
        after += unit.joins(kMostJoinedSquares) ? unit.joined_squares() : unit.squares;
    }
    return after <= kJoinedSquares * before ? kMostJoinedSquares : kJoinedSquares;
}

// Writes row i of `rows` from k elements: for each block, round(x / scale) with scale = max |x| / 127.
template <class T>
inline void quantize_row(const T* x, int64_t k, const CodedRows& rows, int64_t i) {
    constexpr int N = kUnitVectors / kUnitBlocks;
    const int64_t units = rows.columns / CodedRows::kUnit;
    float* all = rows.row_scales(i);  // holds the largest |x| of every block until its scale is known
    VecF v[kUnitVectors];
    for (int64_t u = 0; u < units; ++u) {
        load_unit(x + u * CodedRows::kUnit, k - u * CodedRows::kUnit, v);
        largest_of_blocks(v, all + u * kUnitBlocks);
    }
    const float most = rows.joins() ? most_joined_squares(all, units) : 0;
    CodedRow row(rows, i);
    for (int64_t u = 0; u < units; ++u) {
        const float* largest = all + u * kUnitBlocks;
        const JoinedUnit unit(largest);
        const bool joined = rows.joins() && unit.joins(most);
        VecI32 q[kUnitVectors];
        float scale[kUnitBlocks];
        load_unit(x + u * CodedRows::kUnit, k - u * CodedRows::kUnit, v);
        for (int b = 0; b < kUnitBlocks; ++b) {
            const float of_block = joined ? unit.largest : largest[b], inverse = inverse_of(of_block, 127);
            scale[b] = of_block / 127;
            for (int s = b * N; s < (b + 1) * N; ++s) q[s] = nearest_integers(v[s], inverse);
        }
        row.add_unit(q, scale, joined);
    }
    row.finish();
}

// Writes rows 2i and 2i + 1 of `rows`, the high and the low digits of k elements: 128 high + low = round(x / scale)
// with scale = max |x| / (127 * 128).
template <class T>
inline void quantize_digits(const T* x, int64_t k, const CodedRows& rows, int64_t i) {
    constexpr float kSteps = 127 * CodedRows::kDigit;
    const float largest = largest_of(x, k), inverse = inverse_of(largest, kSteps), low = largest / kSteps;
    const float scale = CodedRows::kDigit * low;
    const float high_scales[] = {scale, scale, scale, scale}, low_scales[] = {low, low, low, low};
    CodedRow high_row(rows, 2 * i), low_row(rows, 2 * i + 1);
    for (int64_t j = 0; j < rows.columns; j += CodedRows::kUnit) {
        VecF v[kUnitVectors];
        VecI32 high[kUnitVectors], rest[kUnitVectors];
        load_unit(x + j, k - j, v);
        for (int s = 0; s < kUnitVectors; ++s) {
            const VecI32 q = nearest_integers(v[s], inverse);
            high[s] = (q + CodedRows::kDigit / 2) >> 7;
            rest[s] = q - high[s] * CodedRows::kDigit;
        }
        high_row.add_unit(high, high_scales, true);
        low_row.add_unit(rest, low_scales, true);
    }
    high_row.finish();
    low_row.finish();
}

}  // namespace kt::KT_ISA
