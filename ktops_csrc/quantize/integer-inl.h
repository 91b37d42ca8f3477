#pragma once

// Quantizers of int8, int4 and uint4: ktops/formats/integer.py.

#include <cstdint>
#include <cstring>

#include "core/workspace.h"
#include "isa/vec-inl.h"
#include "quantize/groups-inl.h"
#include "quantize/half_quadratic-inl.h"
#include "quantize/problem.h"

namespace kt::KT_ISA {

constexpr int kNumScales = 30, kNumRanges = 20, kNumFits = 2;

// Stores codes as bytes, code(x) of n weights.
template <class F>
inline void store_code_bytes(const float* x, int64_t n, uint8_t* out, F code) {
    constexpr int64_t L = kLanes<float>;
    int64_t k = 0;
    for (; k + L <= n; k += L) store_bytes(code(load(x + k)), reinterpret_cast<int8_t*>(out + k));
    if (k < n) {
        int8_t bytes[L];
        store_bytes(code(load(x + k)), bytes);
        std::memcpy(out + k, bytes, static_cast<size_t>(n - k));
    }
}

// The same as nibbles; a last, odd one is followed by 0.
template <class F>
inline void store_code_nibbles(const float* x, int64_t n, uint8_t* out, F code) {
    typedef uint16_t Pairs __attribute__((vector_size(32)));
    typedef uint8_t Bytes16 __attribute__((vector_size(16)));
    for (int64_t k = 0; k < n; k += kChunk) {
        uint8_t bytes[kChunk];
        for (int64_t i = 0; i < kChunk; i += kLanes<float>) {
            store_bytes(code(load(x + k + i)), reinterpret_cast<int8_t*>(bytes + i));
        }
        const Pairs pairs = load_bits<Pairs>(bytes);
        const auto packed = __builtin_convertvector((pairs | pairs >> 4) & 0xff, Bytes16);
        if (n - k >= kChunk) {
            std::memcpy(out + k / 2, &packed, sizeof(packed));
        } else {
            const int64_t left = n - k;
            std::memcpy(out + k / 2, &packed, static_cast<size_t>(ceil_div(left, 2)));
            if (left % 2) out[k / 2 + left / 2] &= 15;
        }
    }
}

// The scale, and for uint4 the zero point, of every lane or group, as they are stored.
struct LaneScales {
    VecF scale, zero;
};

// int8 and int4: integers in [-high - 1, high] times a scale.
template <int kHigh>
struct Symmetric {
    static constexpr bool kNibbles = kHigh == 7, kZeros = false;
    static constexpr double kSmallest = kHigh == 7 ? 0.4 : 0.9;

    const QuantizeProblem& p;

    float stored(float scale) const { return p.row_scale ? scale : to_float(from_float<bfloat16>(scale)); }

    void nearest_scale(const float* x, int64_t n, float& scale, float&) const {
        scale = stored(largest_magnitude(x, n) / kHigh);
    }

    // The scale of either sign with the least squared error.
    LaneScales search(const Lanes& lanes) const {
        VecI32 most{};
        for (int64_t k = 0; k < lanes.n; ++k) most = Larger()(most, magnitude(lanes[k]));
        const VecF largest = bit_cast<VecF>(most) / static_cast<float>(kHigh);
        VecF best = largest, least = broadcast(__builtin_inff());
        for (int step = 0; step < kNumScales; ++step) {
            const VecF scale = largest * shrunk(step, kNumScales, kSmallest);
            const VecF divisor = scale == 0.0f ? broadcast(1.0f) : scale;
            VecF errors[2];
            ordered_sums(lanes.n, errors, [&](int64_t k, VecF* sum) {
                const VecF x = lanes[k], q = nearest(x / divisor);
                const VecF error = rounded(clamp(q, -kHigh - 1, kHigh) * scale) - x;
                const VecF mirrored = rounded(clamp(q, -kHigh, kHigh + 1) * scale) - x;
                sum[0] += rounded(error * error);
                sum[1] += rounded(mirrored * mirrored);
            });
            best = errors[0] < least ? scale : best;
            least = errors[0] < least ? errors[0] : least;
            best = errors[1] < least ? -scale : best;
            least = errors[1] < least ? errors[1] : least;
        }
        return {p.row_scale ? best : to_bfloat16(best), VecF{}};
    }

    void store(const float* x, int64_t n, float scale, float, uint8_t* out) const {
        const VecF divisor = broadcast(divisor_of(scale));
        const auto code = [&](VecF v) { return nearest_codes(clamp(v / divisor, -kHigh - 1, kHigh)); };
        if constexpr (kNibbles) {
            store_code_nibbles(x, n, out, [&](VecF v) { return code(v) + 8; });
        } else {
            store_code_bytes(x, n, out, code);
        }
    }
};

// uint4: integers in [0, 15] minus a zero point, times a scale.
struct Affine {
    static constexpr bool kNibbles = true, kZeros = true;
    static constexpr double kSmallest = 0.4;

    const QuantizeProblem& p;

    VecF stored(VecF scale) const { return p.row_scale ? scale : to_bfloat16(scale); }

    // The scale and the integer zero point of the range [low, high].
    LaneScales of_range(VecF low, VecF high) const {
        const VecF scale = stored((high - low) / 15.0f);
        return {scale, nearest_within(quotient(-low, scale), 0, 15)};
    }

    void nearest_scale(const float* x, int64_t n, float& scale, float& zero) const {
        const Range range = range_of(x, n);
        const LaneScales found = of_range(broadcast(range.low), broadcast(range.high));
        scale = range.largest == range.largest ? found.scale[0] : range.largest;
        zero = found.zero[0];
    }

    static VecF code(VecF x, VecF product, VecF divisor) { return nearest_within((x + product) / divisor, 0, 15); }

    static VecF squared_error(const Lanes& lanes, const LaneScales& s) {
        const VecF product = rounded(s.scale * s.zero), divisor = divisor_of(s.scale);
        return ordered_sum(lanes.n, [&](int64_t k) {
            const VecF x = lanes[k], error = rounded((code(x, product, divisor) - s.zero) * s.scale) - x;
            return rounded(error * error);
        });
    }

    LaneScales search(const Lanes& lanes) const {
        const auto [low, high, most] = range_of(lanes, VecF{});
        LaneScales best = of_range(low, high);
        best = p.method == Method::kMse
                   ? least_error(lanes, low, high, best)
                   : LaneScales{best.scale, from_float16(to_float16(half_quadratic_zero(
                                                lanes, best.scale, 0.0f - quotient(low, best.scale))))};
        best.scale = most < 0x7f800000 ? best.scale : bit_cast<VecF>(most);
        return best;
    }

    // Starts from shrunken ranges and fits scale and zero point to the resulting codes.
    LaneScales least_error(const Lanes& lanes, VecF low, VecF high, LaneScales best) const {
        const VecF mean = mean_of(lanes);
        VecF least = squared_error(lanes, best);
        for (int step = 0; step < kNumRanges; ++step) {
            const double size = 1 - step * (1 - kSmallest) / kNumRanges;
            VecF scale = (high - low) * static_cast<float>(size / 15);
            VecF zero = 7.5f - quotient(low + high, 2 * scale);
            for (int f = 0; f < kNumFits; ++f) {
                const VecF product = rounded(scale * zero), divisor = divisor_of(scale);
                fit(lanes, mean, scale, zero, [&](VecF x) { return code(x, product, divisor); });
            }
            const LaneScales fitted{stored(scale), from_float16(to_float16(zero))};
            const VecF error = squared_error(lanes, fitted);
            best.scale = error < least ? fitted.scale : best.scale;
            best.zero = error < least ? fitted.zero : best.zero;
            least = error < least ? error : least;
        }
        return best;
    }

    void store(const float* x, int64_t n, float scale, float zero, uint8_t* out) const {
        const VecF product = rounded(broadcast(scale) * zero), divisor = broadcast(divisor_of(scale));
        store_code_nibbles(x, n, out, [&](VecF v) { return nearest_codes(clamp((v + product) / divisor, 0, 15)); });
    }
};

// Quantizes rows: finds the scales of their groups, then writes scales and codes.
template <class Q>
class IntegerRows {
public:
    static constexpr int64_t kRows = 16;  // per task

    IntegerRows(const QuantizeProblem& p, Workspace& workspace)
        : p_(p),
          q_{p},
          groups_(p.groups()),
          group_room_(round_up(p.group, kChunk)),
          at_once_(p.method == Method::kRtn ? 1 : kRows),
          rows_(workspace.take<float>(p.num_threads * at_once_ * row_room())),
          lanes_(workspace.take<float>(p.num_threads * kUnitGroups * group_room_)),
          scales_(workspace.take<float>(p.num_threads * 2 * values())) {}

    void operator()(int64_t e, int64_t row, int64_t n, int thread) const {
        float* rows = rows_ + thread * at_once_ * row_room();
        float* scale = scales_ + thread * 2 * values();
        float* zero = scale + values();
        for (int64_t end = row + n; row < end; row += at_once_) {
            const int64_t count = smaller(at_once_, end - row);
            for (int64_t i = 0; i < count; ++i) load_row(p_, e, row + i, row_room(), rows + i * row_room());
            find(rows, count * groups_, lanes_ + thread * kUnitGroups * group_room_, scale, zero);
            for (int64_t i = 0; i < count; ++i) {
                store(e * p_.rows + row + i, rows + i * row_room(), scale + i * groups_, zero + i * groups_);
            }
        }
    }

private:
    int64_t row_room() const { return groups_ * group_room_; }
    int64_t values() const { return round_up(at_once_ * groups_, kUnitGroups); }

    void find(const float* x, int64_t count, float* lanes, float* scale, float* zero) const {
        if (p_.method == Method::kRtn) {
            for (int64_t g = 0; g < count; ++g) q_.nearest_scale(x + g * group_room_, p_.group, scale[g], zero[g]);
            return;
        }
        for (int64_t g = 0; g < count; g += kUnitGroups) {
            to_lanes(x + g * group_room_, group_room_, smaller(kUnitGroups, count - g), lanes);
            for_each_part(lanes, p_.group, [&](const Lanes& part, int64_t first) {
                const LaneScales found = q_.search(part);
                kt::KT_ISA::store(scale + g + first, found.scale);
                kt::KT_ISA::store(zero + g + first, found.zero);
            });
        }
    }

    void store(int64_t row, const float* x, const float* scale, const float* zero) const {
        uint8_t* codes = p_.codes + row * p_.row_bytes;
        for (int64_t g = 0; g < groups_; ++g) {
            const int64_t at = row * groups_ + g, column = g * p_.group, n = smaller(p_.group, p_.columns - column);
            if (p_.row_scale) {
                static_cast<float*>(p_.scale)[at] = scale[g];
            } else {
                static_cast<bfloat16*>(p_.scale)[at] = from_float<bfloat16>(scale[g]);
            }
            if constexpr (Q::kZeros) store_zero(at, zero[g]);
            q_.store(x + g * group_room_, n, scale[g], zero[g], codes + (Q::kNibbles ? column / 2 : column));
        }
    }

    void store_zero(int64_t at, float zero) const {
        if (p_.method == Method::kRtn) {
            static_cast<uint8_t*>(p_.zero)[at] = zero > 0 ? static_cast<uint8_t>(zero) : 0;  // 0 if it is NaN
        } else {
            static_cast<float16*>(p_.zero)[at] = from_float<float16>(zero);
        }
    }

    const QuantizeProblem& p_;
    const Q q_;
    const int64_t groups_, group_room_, at_once_;
    float *const rows_, *const lanes_, *const scales_;
};

}  // namespace kt::KT_ISA
