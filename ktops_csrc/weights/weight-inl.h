#pragma once

// The weights of a projection, [E, rows, columns]: dense in the dtype of the activations, with any strides, or in a
// format; a format that is the same dtype is used like dense weights. If the columns of a dense W are contiguous, this
// is W^T: `transposed` is true, and `rows` and `columns` here are those of W^T. Products call
//   direct(e)                                     rows of an expert in place, row_stride apart; null if not contiguous
//   copy_rows(e, row, n, column, count, out)      contiguous copies of rows, in T
//   dots(...)                                     dot products with up to few_rows() rows, for a weight in a format
//   decode_nt(e, row, n, k, kn, ...)              panels of rows [row, row + n), k in [k, k + kn) along a row
//   decode_nn(e, k, kn, column, n, ...)           panels of columns [column, column + n), k down the rows
// The last two write ceil(n / 16) panels of Compute<T>, `stride` elements apart, padded with zeros. scratch has room
// for kScratch elements of T.

#include <cstdint>
#include <type_traits>

#include "isa/pack-inl.h"
#include "weights/chunk_order-inl.h"
#include "weights/format_table.h"
#include "weights/groups-inl.h"
#include "weights/quantize_rows-inl.h"
#include "weights/strided-inl.h"

namespace kt::KT_ISA {

// Defined in decode-inl.h, or returns the table of another ISA.
const FormatTable& format_table(FormatId format);

template <class T>
class Weight {
    using C = Compute<T>;

public:
    static constexpr bool kDirect = true;
    static constexpr int64_t kScratch = (128 << 10) / static_cast<int64_t>(sizeof(T));

    bool transposed;
    int64_t row_stride;

    explicit Weight(const WeightTensor& tensor)
        : transposed(tensor.is_dense() && tensor.dense.is_transposed()),
          tensor_(tensor),
          strided_{transposed ? tensor.dense.transposed() : tensor.dense} {
        if (holds(tensor)) {
            constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
            strided_.tensor = {tensor.codes, kDType, {tensor.expert_bytes / kBytes, tensor.row_bytes / kBytes, 1}};
        } else if (!tensor.is_dense()) {
            table_ = &format_table(tensor.format);
        }
        row_stride = strided_.tensor.stride[1];
    }

    bool has_format() const { return table_ != nullptr; }

    const T* direct(int64_t e) const {
        const StridedTensor& dense = strided_.tensor;
        if (table_ || dense.stride[2] != 1) return nullptr;
        return static_cast<const T*>(dense.data) + e * dense.stride[0];
    }

    // For a weight in a format: decodes rows to T, `stride` elements apart.
    void decode_rows(int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out, int64_t stride) const {
        if constexpr (std::is_same_v<T, bfloat16>) {
            table_->rows_bfloat16(tensor_, e, row, n, column, count, out, stride);
        } else if constexpr (std::is_same_v<T, float>) {
            table_->rows_float(tensor_, e, row, n, column, count, out, stride);
        } else {
            constexpr int64_t kPart = 256;
            float part[kPart];
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j < count; j += kPart) {
                    const int64_t some = smaller(kPart, count - j);
                    table_->rows_float(tensor_, e, row + i, 1, column + j, some, part, kPart);
                    T* to = out + i * stride + j;
                    if constexpr (std::is_same_v<T, float16>) {
                        for_each_vector<float>(some, [&](int64_t k, int64_t m) { store_n(to + k, load(part + k), m); });
                    } else {
                        for (int64_t k = 0; k < some; ++k) to[k] = part[k];
                    }
                }
            }
        }
    }

    // For a weight in a format: the bytes of so many columns of codes, whole blocks.
    int64_t code_bytes(int64_t columns) const {
        const Format& format = format_of(tensor_);
        return columns * format.bytes / format.block;
    }

    __attribute__((always_inline)) void prefetch_scales(int64_t e, int64_t row, int64_t n, int64_t column,
                                                        int64_t count) const {
        prefetch_groups(tensor_, e, row, n, column, count);
    }

    void copy_rows(int64_t e, int64_t row, int64_t n, int64_t column, int64_t count, T* out) const {
        if (table_) {
            decode_rows(e, row, n, column, count, out, count);
        } else {
            strided_.copy_rows(e, row, n, column, count, out);
        }
    }

    // The most rows of dots(); 0 if it must not be called.
    int64_t few_rows() const { return table_ && !std::is_same_v<T, double> ? table_->few_rows : 0; }
    void order_row(const T* x, float* out) const { order(x, tensor_.columns, table_->split, out); }
    void dots(int64_t e, int64_t row, int64_t n, const float* const* x, int64_t m, float* c, int64_t ldc) const {
        table_->dots(tensor_, e, row, n, x, m, c, ldc);
    }

    // For an integer format: allocates rows of activations for products with codes.
    CodedRows take_codes(Workspace& workspace, int64_t rows, int digits) const {
        return CodedRows::take(workspace, rows, tensor_, digits, table_->pairs, table_->zero_code);
    }
    const WeightTensor& tensor() const { return tensor_; }
    const FormatTable& table() const { return *table_; }

    void decode_nt(int64_t e, int64_t row, int64_t n, int64_t k, int64_t kn, C* panels, int64_t stride,
                   T* scratch) const {
        const T* w = direct(e);
        if (!w && !table_) return strided_.decode_nt(e, row, n, k, kn, panels, stride);
        for (int64_t j = 0; j < n; j += kPanelColumns, panels += stride) {
            const int64_t columns = smaller(kPanelColumns, n - j);
            if (w) {
                pack_nt(w + (row + j) * row_stride + k, row_stride, columns, kn, panels);
                continue;
            }
            for (int64_t i = 0; i < kn; i += kDecodedColumns) {
                const int64_t count = smaller(kDecodedColumns, kn - i);
                decode_rows(e, row + j, columns, k + i, count, scratch, kDecodedStride);
                pack_nt(scratch, kDecodedStride, columns, count, panels + i * kPanelColumns);
            }
        }
    }

    void decode_nn(int64_t e, int64_t k, int64_t kn, int64_t column, int64_t n, C* panels, int64_t stride,
                   T* scratch) const {
        const T* w = direct(e);
        if (!w && !table_) return strided_.decode_nn(e, k, kn, column, n, panels, stride);
        if (w) return pack_nn(Rows<T>{w + k * row_stride, row_stride, nullptr}, column, n, kn, panels, stride);
        const int64_t rows = kScratch / round_up(n, kPanelColumns) / kKMultiple<C> * kKMultiple<C>;
        for (int64_t i = 0; i < kn; i += rows) {
            const int64_t count = smaller(rows, kn - i);
            copy_rows(e, k + i, count, column, n, scratch);
            pack_nn(Rows<T>{scratch, n, nullptr}, 0, n, count, panels + i * kPanelColumns, stride);
        }
    }

private:
    static constexpr DType kDType = std::is_same_v<T, bfloat16>  ? DType::kBFloat16
                                    : std::is_same_v<T, float16> ? DType::kFloat16
                                    : std::is_same_v<T, float>   ? DType::kFloat32
                                                                 : DType::kFloat64;

    // True if the format stores numbers in T, which are used in place like those of a dense weight.
    static bool holds(const WeightTensor& tensor) {
        if constexpr (std::is_same_v<T, bfloat16>) return tensor.format == FormatId::bf16;
        if constexpr (std::is_same_v<T, float16>) return tensor.format == FormatId::fp16;
        return std::is_same_v<T, float> && tensor.format == FormatId::fp32;
    }

    // Columns of 16 rows that are decoded at a time, to stay in L1; and their stride, which is not a power of two.
    static constexpr int64_t kDecodedColumns = 512,
                             kDecodedStride = kDecodedColumns + 64 / static_cast<int64_t>(sizeof(T));

    WeightTensor tensor_;
    StridedWeight<T> strided_;
    const FormatTable* table_ = nullptr;
};

// Decodes whole rows to float32, for kt::dequantize.
inline void decode_rows(const WeightTensor& w, int64_t e, int64_t row, int64_t n, float* out) {
    format_table(w.format).rows_float(w, e, row, n, 0, w.columns, out, w.columns);
}

}  // namespace kt::KT_ISA
