// Kernels that follow from the decoder of a format, with two simple decoders: int8, and uint4 with zero points. The
// tests of formats check every decoder.

#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "buffers.h"
#include "formats/integer-inl.h"
#include "gemm.h"
#include "shape.h"
#include "weights/chunk_order-inl.h"
#include "weights/code_rows-inl.h"
#include "weights/codes-inl.h"
#include "weights/format_kernels-inl.h"
#include "weights/quantize_rows-inl.h"

namespace suites {

// A weight of random codes, scales and zero points.
template <class Decoder, bool kZeros>
struct Coded {
    using Kernels = FormatKernels<Decoder, Scales::kFloats, kZeros>;
    using Codes = CodeKernels<Decoder, kZeros>;
    using Rows = CodeRows<Decoder, kZeros>;
    static constexpr bool kNibbles = Decoder::kPairs;
    static constexpr int kZeroCode = Decoder::kZeroCode;

    int64_t rows, columns, groups;
    Input<uint8_t> bytes;
    Matrix<float> scales;
    Input<uint8_t> zeros;
    WeightTensor weight;

    Coded(int64_t rows, int64_t columns, int64_t group)
        : rows(rows),
          columns(columns),
          groups(ceil_div(columns, group)),
          bytes(rows * row_bytes(columns)),
          scales(rows, groups, groups),
          zeros(rows * groups) {
        for (int64_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(random_integer(0, 255));
        for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint8_t>(random_integer(0, 15));
        weight.format = kNibbles ? FormatId::uint4 : FormatId::int8;
        weight.codes = bytes.data();
        weight.row_bytes = row_bytes(columns);
        weight.columns = columns;
        weight.group = group;
        weight.scale.data = scales.data();
        weight.scale.row_stride = groups;
        weight.zero.data = zeros.data();
        weight.zero.type = GroupValues::Type::kUInt8;
        weight.zero.row_stride = groups;
    }
    static int64_t row_bytes(int64_t columns) { return kNibbles ? ceil_div(columns, 2) : columns; }

    // Unsigned: weights are scale * (code - zero).
    int code(int64_t j, int64_t k) {
        const uint8_t byte = bytes[j * weight.row_bytes + (kNibbles ? k / 2 : k)];
        return kNibbles ? byte >> (k % 2 * 4) & 15 : byte ^ 128;
    }
    float scale(int64_t j, int64_t group) { return scales[j * groups + group]; }
    int zero(int64_t j, int64_t group) { return kZeros ? zeros[j * groups + group] : Decoder::kZeroCode; }

    double value(int64_t j, int64_t k) {
        const int64_t group = k / weight.group;
        return static_cast<double>(scale(j, group)) * (code(j, k) - zero(j, group));
    }
    double size(int64_t j, int64_t k) {
        const int64_t group = k / weight.group;
        return std::fabs(static_cast<double>(scale(j, group))) * (code(j, k) + zero(j, group));
    }
    // The index of column k in rows of codes.
    static int64_t code_index(int64_t k) {
        constexpr int64_t kUnit = Decoder::kCodeColumns;
        return kNibbles ? k / kUnit * kUnit + k % 2 * (kUnit / 2) + k % kUnit / 2 : k;
    }
};

using Signed = Coded<Int8, false>;
using Unsigned = Coded<UInt4, true>;

template <class W, class T>
std::string check_rows(const Shape& shape) {
    const int64_t n = shape.size("columns", 3, 0), k = shape.size("k", 70, 0, kChunk);
    const int64_t first = smaller(shape.size("first", 0, 0), k - 1), count = k - first, stride = shape.stride(count);
    W w(n, k, shape.size("group", 32, 0));
    Output<T> out((n - 1) * stride + count);
    W::Kernels::template rows<T>(w.weight, 0, 0, n, first, count, out.data(), stride);
    for (int64_t at = 0; at < out.size(); ++at) {
        const int64_t j = at / stride, i = at % stride;
        const bool right =
            i < count ? same(out[at], from_float<T>(static_cast<float>(w.value(j, first + i)))) : out.untouched(at);
        if (!right) return "column " + std::to_string(i) + " of row " + std::to_string(j);
    }
    return expect(out.guarded(), "written out of bounds");
}

template <class T>
struct format_rows {
    static std::string run(const Shape& shape) {
        const std::string result = check_rows<Signed, T>(shape);
        return result == "ok" ? check_rows<Unsigned, T>(shape) : result;
    }
};

// Checks with a weight of each decoder.
template <template <class> class Check>
std::string both(const Shape& shape) {
    const std::string result = Check<Signed>::run(shape);
    return result == "ok" ? Check<Unsigned>::run(shape) : "int8: " + result;
}

template <class W>
struct CheckDots {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", kFewRows, kFewRows), n = shape.size("columns", 9, 0);
        const int64_t k = shape.size("k", 70, 0, kChunk), ldc = shape.stride(n), padded = round_up(k, kChunk);
        W w(n, k, shape.size("group", 32, 0));
        Matrix<float> x(m, k, k);
        Input<float> ordered(m * padded);
        std::vector<const float*> a;
        for (int64_t i = 0; i < m; ++i) {
            a.push_back(ordered.data() + i * padded);
            order(x.row(i), k, W::kNibbles, ordered.data() + i * padded);
        }
        Product<float> product(m, n, ldc, n, m, false, 2);
        W::Kernels::dots(w.weight, 0, 0, n, a.data(), m, product.c.data(), ldc);
        return product.check(
            k, [&](int64_t i, int64_t s) { return x.at(i, s); }, [&](int64_t s, int64_t j) { return w.value(j, s); });
    }
};

struct format_dots {
    static std::string run(const Shape& shape) { return both<CheckDots>(shape); }
};

// Activations are codes as well, and the reference uses these.
template <class W>
struct CheckCodeDots {
    static std::string run(const Shape& shape) {
        const int64_t m = shape.size("m", kFewRows, kFewRows), n = shape.size("columns", 9, 0);
        const int64_t k = shape.size("k", 140, 0, CodedRows::kUnit), ldc = shape.stride(n);
        W w(n, k, shape.size("group", 32, 0));
        const auto take = [&](Workspace& from) {
            return CodedRows::take(from, m, w.weight, 1, W::kNibbles, W::kZeroCode);
        };
        Workspace counting;
        take(counting);
        Workspace workspace(counting.bytes());
        const CodedRows coded = take(workspace);
        Matrix<float> x(m, k, k);
        std::vector<int64_t> index;
        for (int64_t i = 0; i < m; ++i) {
            quantize_row(x.row(i), k, coded, i);
            index.push_back(m - 1 - i);
        }
        Product<float> product(m, n, ldc, n, m, false, 8);
        W::Codes::dots(w.weight, 0, 0, n, coded, index.data(), m, product.c.data(), ldc);
        return product.check(
            k,
            [&](int64_t i, int64_t s) {
                const int64_t row = index[i];
                return static_cast<double>(coded.row_scales(row)[s / CodedRows::kBlock]) *
                       coded.row(row)[W::code_index(s)];
            },
            [&](int64_t s, int64_t j) { return w.value(j, s); }, [&](int64_t s, int64_t j) { return w.size(j, s); });
    }
};

struct code_dots {
    static std::string run(const Shape& shape) { return both<CheckCodeDots>(shape); }
};

template <class W>
struct CheckCodeRows {
    static std::string run(const Shape& shape) {
        const int64_t n = shape.size("columns", 3, 0), k = shape.size("k", 140, 0, CodedRows::kUnit);
        const int64_t padded = round_up(k, CodedRows::kUnit), stride = shape.stride(padded);
        W w(n, k, 32);
        Output<uint8_t> out((n - 1) * stride + padded);
        W::Rows::rows(w.weight, 0, 0, n, 0, padded, out.data(), stride);
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t s = 0; s < k; ++s) {
                if (out[j * stride + W::code_index(s)] != w.code(j, s)) return "column " + std::to_string(s);
            }
            for (int64_t i = j * stride + padded; i < smaller((j + 1) * stride, out.size()); ++i) {
                if (!out.untouched(i)) return "written between rows";
            }
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

struct code_rows {
    static std::string run(const Shape& shape) { return both<CheckCodeRows>(shape); }
};

template <class W>
struct CheckCodePanel {
    static std::string run(const Shape& shape) {
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 140, 0, CodedRows::kUnit);
        const int64_t padded = round_up(k, CodedRows::kUnit);
        W w(n, k, 32);
        Output<uint8_t> out(padded * kPanelColumns);
        W::Rows::panel(w.weight, 0, 0, n, 0, padded, out.data(), shape.is("ahead", "64") ? 64 : 0);
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t s = 0; s < k; ++s) {
                const int64_t at = W::code_index(s);
                if (out[at / 4 * 64 + j * 4 + at % 4] != w.code(j, s)) return "column " + std::to_string(s);
            }
        }
        return expect(out.guarded(), "written out of bounds");
    }
};

struct code_panel {
    static std::string run(const Shape& shape) { return both<CheckCodePanel>(shape); }
};

template <class W>
struct CheckCodeScales {
    static std::string run(const Shape& shape) {
        const int64_t n = shape.size("columns", 16, 16), k = shape.size("k", 140, 0, CodedRows::kUnit);
        W w(n, k, shape.size("group", 32, 0));
        const int64_t apart = shape.stride(kPanelColumns), size = (w.groups - 1) * apart + kPanelColumns;
        Output<float> scale(size), min(size);
        W::Rows::scales(w.weight, 0, 0, n, 0, w.groups, scale.data(), min.data(), apart);
        for (int64_t at = 0; at < size; ++at) {
            const int64_t g = at / apart, j = at % apart;
            if (j >= kPanelColumns) {
                if (!scale.untouched(at) || !min.untouched(at)) return "written between groups";
            } else {
                const float s = j < n ? w.scale(j, g) : 0, zero = static_cast<float>(j < n ? w.zero(j, g) : 0);
                if (scale[at] != s || min[at] != s * zero)
                    return "group " + std::to_string(g) + " of row " + std::to_string(j);
            }
        }
        return expect(scale.guarded() && min.guarded(), "written out of bounds");
    }
};

struct code_scales {
    static std::string run(const Shape& shape) { return both<CheckCodeScales>(shape); }
};

}  // namespace suites
