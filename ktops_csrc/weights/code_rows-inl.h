#pragma once

// Codes of integer formats (decoders: formats/decoder-inl.h) as rows and as panels, and their scales.

#include <cstdint>
#include <cstring>

#include "formats/decoder-inl.h"
#include "isa/dot4-inl.h"
#include "isa/pack-inl.h"
#include "weights/format_table.h"
#include "weights/groups-inl.h"

namespace kt::KT_ISA {

template <class Decoder, bool kZeros>
class CodeRows {
    static constexpr int64_t kColumns = Decoder::kCodeColumns, kStep = Decoder::kCodeStep;
    static constexpr bool kInUnit = Decoder::kCodeGroup > 0;
    static constexpr int64_t kGroups = kInUnit ? kColumns / Decoder::kCodeGroup : 1;
    static constexpr bool kSecond = kZeros || Decoder::kMins;  // a group also has a zero point or a min

public:
    // Scales of a unit, followed by its mins, padded to a multiple of 16 numbers.
    static constexpr int64_t kUnitScales = (kGroups * (Decoder::kMins ? 2 : 1) + 15) / 16 * 16;

    // Writes codes [k, k + kn) of n rows, `stride` bytes apart. k and kn are multiples of kColumns; codes past the last
    // column are unspecified.
    static void rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                     int64_t stride) {
        for (int64_t j = 0; j < n; ++j) {
            const uint8_t* unit = w.row(e, row + j) + k / kColumns * kStep;
            uint8_t last[kStep];
            for (int64_t i = 0; i < kn; i += kColumns, unit += kStep) {
                if (__builtin_expect(k + i + kColumns > w.columns, 0)) unit = copy_last(unit, w.columns - k - i, last);
                VecCodes codes[kColumns / kCodeBytes];
                Decoder::codes(unit, codes);
                std::memcpy(out + j * stride + i, codes, sizeof(codes));
            }
        }
    }

    // Writes codes of n <= kPanelColumns rows as a panel, [kn / 4][16][4]. Columns of the panel past the n-th are
    // unspecified. Prefetches what is `ahead` bytes past the units it reads, unless `ahead` is 0.
    static void panel(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, uint8_t* out,
                      int64_t ahead) {
        int64_t i = 0;
        if constexpr (Decoder::kCodesAByte > 0 && kCodeBytes == 64) {
            if (n == kPanelColumns) {
                const uint8_t* unit = w.row(e, row) + k / kColumns * kStep;
                for (; i < kn && k + i + kColumns <= w.columns; i += kColumns, unit += kStep) {
                    if (ahead) prefetch_units(unit + ahead, w.row_bytes);
                    unit_panel(unit, w.row_bytes, out + i * kPanelColumns);
                }
            }
        }
        for (; i < kn; i += kColumns) {
            constexpr int64_t kStride = kColumns + 64;  // not a power of two
            alignas(64) uint8_t unit[kPanelColumns * kStride];
            if (ahead) prefetch_units(w.row(e, row) + (k + i) / kColumns * kStep + ahead, w.row_bytes);
            rows(w, e, row, n, k + i, kColumns, unit, kStride);
            for (int64_t j = 0; j < kColumns; j += 64)
                transpose_block(unit + j, kStride, out + (i + j) * kPanelColumns);
        }
    }

    // Writes scales of groups [first, first + count) of n <= kPanelColumns rows, and scale * zero: those of row j and
    // group first + g at g * apart + j. Zeros for rows past the n-th, up to kPanelColumns.
    static void scales(const WeightTensor& w, int64_t e, int64_t row, int64_t n, int64_t first, int64_t count,
                       float* scale, float* min, int64_t apart) {
        constexpr int64_t N = kPanelColumns;
        if (!kInUnit && w.group >= w.columns && one_a_row(w.scale) && (!kZeros || one_a_row(w.zero))) {
            float ones[N], seconds[N];
            load_scales(w, e, row, 0, n, ones);
            if constexpr (kZeros) load_groups(w.zero, e, row, 0, n, seconds);
            return put_scales(ones, seconds, scale, min);
        }
        alignas(64) float ones[N * N] = {}, seconds[kSecond ? N * N : 1] = {};
        for (int64_t g = 0; g < count; g += N) {
            const int64_t groups = smaller(N, count - g);
            alignas(64) float by_group[N * N], second_by_group[kSecond ? N * N : 1];
            for (int64_t j = 0; j < n; ++j) {
                row_scales(w, e, row + j, first + g, groups, ones + j * N, seconds + (kSecond ? j * N : 0));
            }
            transpose_floats(ones, by_group);
            if constexpr (kSecond) transpose_floats(seconds, second_by_group);
            for (int64_t i = 0; i < groups; ++i) {
                put_scales(by_group + i * N, second_by_group + (kSecond ? i * N : 0), scale + (g + i) * apart,
                           min + (g + i) * apart);
            }
        }
    }

    // Loads scales that are stored in a tensor of their own.
    static void load_scales(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t n, float* out) {
        load_groups(w.scale, e, row, first, n, out, Decoder::kFactor);
    }

    // Copies the last unit of a row, which has only `columns` columns: memory may end with it.
    __attribute__((noinline)) static const uint8_t* copy_last(const uint8_t* from, int64_t columns, uint8_t* last) {
        std::memset(last, 0, kStep);
        if (columns > 0) std::memcpy(last, from, static_cast<size_t>(ceil_div(columns * kStep, kColumns)));
        return last;
    }

private:
    __attribute__((always_inline)) static void prefetch_units(const uint8_t* unit, int64_t row_bytes) {
        for (int64_t j = 0; j < kPanelColumns; ++j) {
            for (int64_t b = 0; b < kStep; b += 64) __builtin_prefetch(unit + j * row_bytes + b, 0, 2);
        }
    }

    // Packs one unit of each of 16 rows, for formats whose bytes can be decoded one by one: transposes bytes, then
    // decodes them in registers.
    static void unit_panel(const uint8_t* unit, int64_t row_bytes, uint8_t* out) {
        constexpr int64_t kBlocks = kStep / 64, kBlockBytes = 64 * kPanelColumns;
        for (int64_t b = 0; b < kBlocks; ++b, unit += 64, out += kBlockBytes) {
            transpose_16x16(reinterpret_cast<const char*>(unit), row_bytes, [&](int k, auto bytes) {
                VecCodes codes[Decoder::kCodesAByte];
                Decoder::codes_of((VecCodes)bytes, codes);
                for (int64_t i = 0; i < Decoder::kCodesAByte; ++i) {
                    std::memcpy(out + i * kBlocks * kBlockBytes + k * 64, codes + i, sizeof(VecCodes));
                }
            });
        }
    }

    static bool one_a_row(const GroupValues& values) { return values.row_stride == 1 && values.row_block == 1; }

    static void transpose_floats(const float* rows, float* out) {
        transpose_16x16(reinterpret_cast<const char*>(rows), kPanelColumns * static_cast<int64_t>(sizeof(float)),
                        reinterpret_cast<uint32_t*>(out));
    }

    // Reads the numbers of up to 16 groups of a row.
    static void row_scales(const WeightTensor& w, int64_t e, int64_t row, int64_t first, int64_t count, float* scale,
                           float* second) {
        if constexpr (kInUnit) {
            const uint8_t* codes = w.row(e, row);
            for (int64_t g = first / kGroups * kGroups; g < first + count; g += kGroups) {
                const uint8_t* unit = codes + g / kGroups * kStep;
                uint8_t last[kStep];
                const int64_t columns = w.columns - g * Decoder::kCodeGroup;
                if (columns < kColumns) unit = copy_last(unit, columns, last);
                float numbers[kUnitScales];
                Decoder::code_scales(unit, numbers);
                for (int64_t i = larger(0, first - g); i < smaller(kGroups, first + count - g); ++i) {
                    scale[g + i - first] = numbers[i];
                    if constexpr (kSecond) second[g + i - first] = numbers[kGroups + i];
                }
            }
        } else {
            load_scales(w, e, row, first, count, scale);
            if constexpr (kZeros) load_groups(w.zero, e, row, first, count, second);
        }
    }

    static void put_scales(const float* ones, const float* seconds, float* scale, float* min) {
        for (int64_t j = 0; j < kPanelColumns; j += kLanes<float>) {
            const VecF s = load(ones + j);
            store(scale + j, s);
            if constexpr (Decoder::kMins) {
                store(min + j, load(seconds + j));
            } else if constexpr (kZeros) {
                store(min + j, s * load(seconds + j));
            } else {
                store(min + j, s * static_cast<float>(Decoder::kZeroCode));
            }
        }
    }
};

}  // namespace kt::KT_ISA
