#pragma once

// Groups of weights that share a scale: as rows of floats, and as lanes, for searches in many groups at once.
//
// All results have the same bits on every ISA, and those of ktops/formats: a product is rounded before it is added to,
// and sums have a fixed order.

#include <cstdint>
#include <cstring>

#include "core/views.h"
#include "isa/vec-inl.h"
#include "quantize/problem.h"
#include "weights/quantize_rows-inl.h"

namespace kt::KT_ISA {

// A product that the compiler does not fuse with a sum.
inline VecF rounded(VecF product) {
    __asm__("" : "+v"(product));
    return product;
}
inline float rounded(float product) {
    __asm__("" : "+v"(product));
    return product;
}

// NaN if x is.
inline VecF clamp(VecF x, float low, float high) {
    x = x < low ? broadcast(low) : x;
    return x > high ? broadcast(high) : x;
}

// The nearest integers to |x| <= 2^22.
inline VecF nearest(VecF x) { return x + kRound - kRound; }
inline VecI32 nearest_codes(VecF x) { return bit_cast<VecI32>(x + kRound) - kRoundBits; }

// The integers in [low, high] nearest to x.
inline VecF nearest_within(VecF x, float low, float high) { return nearest(clamp(x, low, high)); }

// Such that x / divisor is 0 if the scale is.
inline VecF divisor_of(VecF scale) { return scale == 0.0f ? broadcast(__builtin_inff()) : scale; }
inline float divisor_of(float scale) { return scale == 0 ? __builtin_inff() : scale; }

inline float quotient(float x, float scale) { return x / divisor_of(scale); }
inline VecF quotient(VecF x, VecF scale) { return x / divisor_of(scale); }

inline VecF to_bfloat16(VecF x) { return bit_cast<VecF>(round_to_bfloat16(x) << 16); }

// Loads row `row` of expert e as floats, and zeros up to `room`.
template <class T>
inline void load_row(const T* x, int64_t stride, int64_t n, float* out) {
    if (stride == 1) {
        for_each_vector<float>(n, [&](int64_t i, int64_t lanes) { store_n(out + i, load_n(x + i, lanes), lanes); });
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = load_scalar(x + i * stride);
    }
}
inline void load_row(const QuantizeProblem& p, int64_t e, int64_t row, int64_t room, float* out) {
    const StridedTensor& w = p.weight;
    const int64_t offset = e * w.stride[0] + row * w.stride[1];
    if (w.dtype == DType::kBFloat16) {
        load_row(static_cast<const bfloat16*>(w.data) + offset, w.stride[2], p.columns, out);
    } else if (w.dtype == DType::kFloat16) {
        load_row(static_cast<const float16*>(w.data) + offset, w.stride[2], p.columns, out);
    } else {
        load_row(static_cast<const float*>(w.data) + offset, w.stride[2], p.columns, out);
    }
    std::memset(out + p.columns, 0, static_cast<size_t>(room - p.columns) * sizeof(float));
}

// The smallest and the largest of n weights and 0, and the largest |x|, which is NaN if a weight is NaN or infinite.
// x holds zeros up to a multiple of 16.
struct Range {
    float low = 0, high = 0, largest = 0;
};
inline Range of_lanes(VecF low, VecF high) {
    Range range{low[0], high[0], 0};
    for (int i = 1; i < kLanes<float>; ++i) {
        range.low = low[i] < range.low ? low[i] : range.low;
        range.high = high[i] > range.high ? high[i] : range.high;
    }
    return range;
}
inline int32_t largest_lane(VecI32 v) {
    int32_t lanes[kLanes<float>], most = 0;
    std::memcpy(lanes, &v, sizeof(v));
    for (int32_t lane : lanes) most = lane > most ? lane : most;
    return most;
}
inline float largest_magnitude(const float* x, int64_t n) {
    constexpr int64_t L = kLanes<float>;
    VecI32 most[2] = {};
    for (int64_t k = 0; k < n; k += 16) {
        for (int64_t i = 0; i < 16; i += L) most[i / L % 2] = Larger()(most[i / L % 2], magnitude(load(x + k + i)));
    }
    return finite_or_nan(largest_lane(Larger()(most[0], most[1])));
}
inline Range range_of(const float* x, int64_t n) {
    constexpr int64_t L = kLanes<float>;
    VecF low{}, high{};
    for (int64_t k = 0; k < round_up(n, 16); k += L) {
        const VecF v = load(x + k);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    Range range = of_lanes(low, high);
    range.largest = largest_magnitude(x, n);
    return range;
}

// A search treats kUnitGroups groups at once, a lane each, in parts of one vector.
constexpr int64_t kUnitGroups = 16;

// Groups in lanes: vector k holds element k of each.
struct Lanes {
    const float* x;
    int64_t n;

    VecF operator[](int64_t k) const { return load(x + k * kUnitGroups); }
};

// The smallest weight of each lane and 0, the largest and `high`, and the bits of the largest |x|.
struct LaneRange {
    VecF low{}, high;
    VecI32 most{};
};
inline LaneRange range_of(const Lanes& lanes, VecF high) {
    LaneRange range{VecF{}, high, VecI32{}};
    for (int64_t k = 0; k < lanes.n; ++k) {
        const VecF x = lanes[k];
        range.low = x < range.low ? x : range.low;
        range.high = x > range.high ? x : range.high;
        range.most = Larger()(range.most, magnitude(x));
    }
    return range;
}

// Transposes kUnitGroups groups, `room` floats apart, of which `count` exist. room is a multiple of 16.
inline void to_lanes(const float* groups, int64_t room, int64_t count, float* lanes) {
    float zeros[kUnitGroups * 16];
    for (int64_t k = 0; k < room; k += 16) {
        const char* rows = reinterpret_cast<const char*>(groups + k);
        int64_t stride = room * static_cast<int64_t>(sizeof(float));
        if (count < kUnitGroups) {
            std::memset(zeros, 0, sizeof(zeros));
            for (int64_t g = 0; g < count; ++g) std::memcpy(zeros + g * 16, rows + g * stride, 64);
            rows = reinterpret_cast<const char*>(zeros);
            stride = 64;
        }
        uint32_t out[16 * 16];
        transpose_16x16(rows, stride, out);
        std::memcpy(lanes + k * kUnitGroups, out, sizeof(out));
    }
}

// Calls part(lanes, first) for every vector of a unit, whose lanes are the groups from `first`.
template <class F>
inline void for_each_part(const float* lanes, int64_t n, F part) {
    for (int64_t first = 0; first < kUnitGroups; first += kLanes<float>) part(Lanes{lanes + first, n}, first);
}

// Sums over n elements, several at once; add(k, sums) adds element k. The order is that of `ordered_sum` in
// ktops/formats/sums.py: segments of 16 elements one by one, then neighboring sums in pairs.
template <int kSums, class F>
inline void ordered_sums(int64_t n, VecF (&sums)[kSums], F add) {
    constexpr int64_t kSegment = 16;
    constexpr int kLevels = 48;
    VecF partial[kLevels][kSums];
    int64_t segment = 0;
    for (int64_t begin = 0; begin < n; begin += kSegment, ++segment) {
        VecF sum[kSums] = {};
        if (begin + kSegment <= n) {
#pragma GCC unroll 4
            for (int64_t k = 0; k < kSegment; ++k) add(begin + k, sum);
        } else {
            for (int64_t k = begin; k < n; ++k) add(k, sum);
        }
        int level = 0;
        for (int64_t bits = segment; bits & 1; bits >>= 1, ++level) {
            for (int s = 0; s < kSums; ++s) sum[s] = partial[level][s] + sum[s];
        }
        for (int s = 0; s < kSums; ++s) partial[level][s] = sum[s];
    }
    for (VecF& sum : sums) sum = VecF{};
    bool first = true;
    for (int level = 0; segment >> level; ++level) {
        if (!(segment >> level & 1)) continue;
        for (int s = 0; s < kSums; ++s) sums[s] = first ? partial[level][s] : partial[level][s] + sums[s];
        first = false;
    }
}
template <class F>
inline VecF ordered_sum(int64_t n, F term) {
    VecF sums[1];
    ordered_sums(n, sums, [&](int64_t k, VecF* sum) { sum[0] += term(k); });
    return sums[0];
}
inline VecF mean_of(const Lanes& lanes) {
    return ordered_sum(lanes.n, [&](int64_t k) { return lanes[k]; }) / static_cast<float>(lanes.n);
}

// Fits scale and zero point to codes by least squares; code(x) is that of x. Keeps the scale if all codes are equal.
template <class F>
inline void fit(const Lanes& lanes, VecF mean, VecF& scale, VecF& zero, F code) {
    VecF sums[3];
    ordered_sums(lanes.n, sums, [&](int64_t k, VecF* sum) {
        const VecF x = lanes[k], q = code(x);
        sum[0] += q;
        sum[1] += rounded(q * q);
        sum[2] += rounded(q * (x - mean));
    });
    const VecF center = sums[0] / static_cast<float>(lanes.n);
    const VecF fitted = quotient(sums[2], sums[1] - rounded(sums[0] * center));
    scale = fitted == 0.0f ? scale : fitted;
    zero = center - quotient(mean, scale);
}

// Returns the float32 nearest to the fraction of a range that a search tries in a step.
inline float shrunk(int step, int steps, double smallest) {
    return static_cast<float>(1 - step * (1 - smallest) / steps);
}

}  // namespace kt::KT_ISA
