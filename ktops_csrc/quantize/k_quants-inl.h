#pragma once

// Quantizers of the k-quants: ktops/formats/k_quants.py.

#include <cstdint>
#include <cstring>

#include "core/workspace.h"
#include "isa/vec-inl.h"
#include "quantize/groups-inl.h"
#include "quantize/k_quant_blocks-inl.h"
#include "quantize/problem.h"

namespace kt::KT_ISA {

constexpr int kNumKQuantRanges = 10, kNumKQuantFits = 2;

// The scale and the minimum of the groups in lanes, or the step and the offset that follow from them.
struct LaneSteps {
    VecF step, offset;

    void take_if(VecI32 condition, const LaneSteps& other) {
        step = condition ? other.step : step;
        offset = condition ? other.offset : offset;
    }
};

// Integers times their units, d and dmin.
inline LaneSteps times(const LaneSteps& integers, const LaneSteps& units) {
    return {rounded(integers.step * units.step), rounded(integers.offset * units.offset)};
}

// Searches in groups of layout Q.
template <class Q>
struct KQuantSearch {
    static VecF inverse_of(VecF step) { return step == 0.0f ? VecF{} : 1.0f / step; }
    static VecF code(VecF x, VecF offset, VecF inverse) {
        return nearest_within(rounded((x + offset) * inverse), Q::kLow, Q::kHigh);
    }

    static VecF squared_error(const Lanes& lanes, const LaneSteps& s) {
        const VecF inverse = inverse_of(s.step);
        return ordered_sum(lanes.n, [&](int64_t k) {
            const VecF x = lanes[k], error = rounded(code(x, s.offset, inverse) * s.step) - s.offset - x;
            return rounded(error * error);
        });
    }

    // The step and the offset that cover the smallest and the largest weight.
    static LaneSteps range(const Lanes& lanes) {
        const auto [low, high, most] = range_of(lanes, lanes[0]);
        const VecF largest = bit_cast<VecF>(most < 0x7f800000 ? most : VecI32{} + 0x7fc00000);
        if constexpr (!Q::kMinimum) return {largest / static_cast<float>(Q::kHigh), VecF{}};
        const VecF step = (high - low) / static_cast<float>(Q::kHigh);
        return {largest == largest ? step : largest, -low};
    }

    // The unrounded step and offset with the least squared error.
    static LaneSteps search(const Lanes& lanes, const LaneSteps& start) {
        LaneSteps best = start;
        VecF least = squared_error(lanes, start);
        const auto consider = [&](const LaneSteps& trial) {
            const VecF error = squared_error(lanes, trial);
            best.take_if(error < least, trial);
            least = error < least ? error : least;
        };
        const VecF mean = Q::kMinimum ? mean_of(lanes) : VecF{};
        for (int i = 0; i < kNumKQuantRanges; ++i) {
            const float size = shrunk(i, kNumKQuantRanges, Q::kSmallest);
            if constexpr (Q::kMinimum) {
                consider(fitted(lanes, mean, start, size));
            } else {
                consider({start.step * size, start.offset});
                consider({start.step * -size, start.offset});
            }
        }
        return best;
    }

    static LaneSteps fitted(const Lanes& lanes, VecF mean, const LaneSteps& start, float size) {
        constexpr float kHalf = Q::kHigh / 2.0f;
        const VecF middle = rounded(start.step * kHalf) - start.offset;
        VecF step = rounded(start.step * size), offset = rounded(step * kHalf) - middle;
        for (int f = 0; f < kNumKQuantFits; ++f) {
            const VecF inverse = inverse_of(step);
            VecF zero;
            fit(lanes, mean, step, zero, [&](VecF x) { return code(x, offset, inverse); });
            const VecF product = rounded(step * zero);
            offset = product < 0.0f ? VecF{} : product;
        }
        return {step, offset};
    }

    // The best nearby integers for each group; rounding both to nearest may not be optimal.
    static LaneSteps neighbors(const Lanes& lanes, const LaneSteps& integers, const LaneSteps& units) {
        LaneSteps best = integers;
        VecF least = squared_error(lanes, times(integers, units));
        constexpr float kMost = Q::kMost, kLowest = Q::kMinimum ? 0 : -kMost;
        constexpr int kReach = Q::kMinimum ? 1 : 0;
        for (int up = -3; up <= 3; ++up) {
            for (int down = -kReach; down <= kReach; ++down) {
                const LaneSteps trial{clamp(integers.step + static_cast<float>(up), kLowest, kMost),
                                      clamp(integers.offset + static_cast<float>(down), 0, kMost)};
                const VecF error = squared_error(lanes, times(trial, units));
                best.take_if(error < least, trial);
                least = error < least ? error : least;
            }
        }
        return best;
    }
};

// x >= 0, rounded up to float16, because rounding to nearest would turn tiny numbers into 0.
inline float16 float16_above(float x) {
    float16 nearest = from_float<float16>(x);
    if (to_float(nearest) < x) ++nearest.bits;
    return nearest;
}

// Quantizes the blocks of rows, a unit of 16 groups, one block or two, at a time.
template <class Q>
class KQuantRows {
public:
    static constexpr int64_t kRows = 8;

    KQuantRows(const QuantizeProblem& p, Workspace& workspace)
        : p_(p),
          room_(round_up(p.columns, kUnitWeights)),
          row_(workspace.take<float>(p.num_threads * room_)),
          lanes_(workspace.take<float>(p.num_threads * kUnitWeights)) {}

    void operator()(int64_t e, int64_t row, int64_t n, int thread) const {
        float* x = row_ + thread * room_;
        for (int64_t i = 0; i < n; ++i) {
            load_row(p_, e, row + i, room_, x);
            uint8_t* out = p_.codes + (e * p_.rows + row + i) * p_.row_bytes;
            for (int64_t k = 0; k < p_.columns; k += kUnitWeights) {
                unit(x + k, smaller(kUnitBlocks, (p_.columns - k) / 256), lanes_ + thread * kUnitWeights,
                     out + k / 256 * Q::kBytes);
            }
        }
    }

private:
    using Search = KQuantSearch<Q>;
    static constexpr int64_t kBlockGroups = 256 / Q::kGroup, kUnitBlocks = kUnitGroups / kBlockGroups,
                             kUnitWeights = kUnitBlocks * 256;

    // The scales of the groups of a unit: step and offset are integers once d and dmin are known.
    struct UnitScales {
        float step[kUnitGroups], offset[kUnitGroups];
        float16 d[kUnitBlocks], dmin[kUnitBlocks];

        float d_of(int64_t group) const { return to_float(d[group / kBlockGroups]); }
        float dmin_of(int64_t group) const { return to_float(dmin[group / kBlockGroups]); }

        LaneSteps part(int64_t first) const { return {load(step + first), load(offset + first)}; }
        void set_part(int64_t first, const LaneSteps& s) {
            kt::KT_ISA::store(step + first, s.step);
            kt::KT_ISA::store(offset + first, s.offset);
        }
        // d and dmin of the groups from `first`: a vector may cover two blocks.
        LaneSteps units(int64_t first) const {
            LaneSteps s;
            for (int i = 0; i < kLanes<float>; ++i) {
                s.step[i] = d_of(first + i);
                s.offset[i] = dmin_of(first + i);
            }
            return s;
        }

        // Rounds steps and offsets to integers times d and dmin.
        void round_to_integers() {
            for (int64_t b = 0; b < kUnitBlocks; ++b) {
                d[b] = round_block(step + b * kBlockGroups);
                dmin[b] = round_block(offset + b * kBlockGroups);
            }
        }
        static float16 round_block(float* x) {
            float most = 0;
            for (int64_t g = 0; g < kBlockGroups; ++g) {
                const float size = x[g] < 0 ? -x[g] : x[g];
                most = size > most || size != size ? size : most;
            }
            const float16 unit = float16_above(most / Q::kMost);
            const VecF divisor = broadcast(divisor_of(to_float(unit)));
            for (int64_t g = 0; g < kBlockGroups; g += kLanes<float>) {
                const int64_t n = smaller(kLanes<float>, kBlockGroups - g);
                store_n(x + g, nearest(load_n(x + g, n) / divisor), n);
            }
            return unit;
        }
    };

    void unit(const float* x, int64_t blocks, float* lanes, uint8_t* out) const {
        to_lanes(x, Q::kGroup, blocks * kBlockGroups, lanes);
        UnitScales scales;
        for_each_part(lanes, Q::kGroup,
                      [&](const Lanes& part, int64_t first) { scales.set_part(first, Search::range(part)); });
        UnitScales found = scales;
        scales.round_to_integers();
        if (p_.method == Method::kMse) search(lanes, scales, found);
        for (int64_t b = 0; b < blocks; ++b) {
            KQuantBlock block;
            block.d = scales.d[b];
            block.dmin = scales.dmin[b];
            for (int64_t g = 0; g < kBlockGroups; ++g) group(x + b * 256, scales, b * kBlockGroups + g, g, block);
            Q::pack(block, out + b * Q::kBytes);
        }
    }

    // Replaces the scales of the blocks for which the search has found better ones. `found` holds their ranges.
    void search(const float* lanes, UnitScales& scales, UnitScales& found) const {
        for_each_part(lanes, Q::kGroup, [&](const Lanes& part, int64_t first) {
            found.set_part(first, Search::search(part, found.part(first)));
        });
        found.round_to_integers();
        float error[2][kUnitGroups];
        for_each_part(lanes, Q::kGroup, [&](const Lanes& part, int64_t first) {
            const LaneSteps units = found.units(first), before = scales.units(first);
            found.set_part(first, Search::neighbors(part, found.part(first), units));
            store(error[0] + first, Search::squared_error(part, times(found.part(first), units)));
            store(error[1] + first, Search::squared_error(part, times(scales.part(first), before)));
        });
        for (int64_t b = 0; b < kUnitBlocks; ++b) {
            float sum[2] = {};
            for (int64_t g = b * kBlockGroups; g < (b + 1) * kBlockGroups; ++g) {
                sum[0] += error[0][g];
                sum[1] += error[1][g];
            }
            if (!(sum[0] < sum[1])) continue;
            scales.d[b] = found.d[b];
            scales.dmin[b] = found.dmin[b];
            std::memcpy(scales.step + b * kBlockGroups, found.step + b * kBlockGroups, kBlockGroups * sizeof(float));
            std::memcpy(scales.offset + b * kBlockGroups, found.offset + b * kBlockGroups,
                        kBlockGroups * sizeof(float));
        }
    }

    // Writes the codes and the integer scales of group g of a block, which is group `i` of the unit.
    static void group(const float* x, const UnitScales& scales, int64_t i, int64_t g, KQuantBlock& block) {
        const VecF step = broadcast(scales.step[i] * scales.d_of(i));
        const VecF offset = broadcast(scales.offset[i] * scales.dmin_of(i));
        const VecF inverse = Search::inverse_of(step);
        for (int64_t k = g * Q::kGroup; k < (g + 1) * Q::kGroup; k += kLanes<float>) {
            const VecF code = Search::code(load(x + k), rounded(offset), inverse) - static_cast<float>(Q::kLow);
            store_bytes(nearest_codes(code), reinterpret_cast<int8_t*>(block.codes + k));
        }
        block.scale[g] = static_cast<int8_t>(bit_cast<int32_t>(scales.step[i] + kRound) - kRoundBits);
        block.minimum[g] = static_cast<uint8_t>(bit_cast<int32_t>(scales.offset[i] + kRound) - kRoundBits);
    }

    const QuantizeProblem& p_;
    const int64_t room_;
    float *const row_, *const lanes_;
};

}  // namespace kt::KT_ISA
