#pragma once

// A table of kernels for every format.

#include "weights/code_rows-inl.h"
#include "weights/codes-inl.h"
#include "weights/format.h"
#include "weights/format_kernels-inl.h"
#include "weights/format_table.h"
#include "weights/groups-inl.h"

#define KT_FORMAT_DECODERS
#include "formats/formats.def"
#undef KT_FORMAT_DECODERS

namespace kt::KT_ISA {

template <class Decoder, Scales kScales, bool kZeros, int64_t kCodeGroup>
constexpr FormatTable make_table() {
    using Kernels = FormatKernels<Decoder, kScales, kZeros>;
    FormatTable table{&Kernels::template rows<float>, &Kernels::template rows<bfloat16>, &Kernels::dots, kFewRows,
                      Decoder::kSplit};
    if constexpr (kCodeGroup > 0) {
        static_assert(Decoder::kCodeGroup == (kCodeGroup > 1 ? kCodeGroup : 0));
        using Rows = CodeRows<Decoder, kZeros>;
        table.code_dots = &CodeKernels<Decoder, kZeros>::dots;
        table.code_rows = &Rows::rows;
        table.code_panel = &Rows::panel;
        table.code_scales = &Rows::scales;
        table.zero_code = Decoder::kZeroCode;
        table.pairs_in_word = pairs_in_word(Decoder::kMaxCode);
        table.code_columns = Decoder::kCodeColumns;
        table.pairs = Decoder::kPairs;
        table.code_mins = kZeros || Decoder::kMins;
    }
    return table;
}

const FormatTable& format_table(FormatId format) {
    struct Tables {
        FormatTable of[static_cast<int>(FormatId::dense)] = {
#define KT_FORMAT(name, Type, element, block, bytes, scales, zeros, code_group) \
    make_table<Type, Scales::scales, zeros, code_group>(),
#include "formats/formats.def"
#undef KT_FORMAT
        };
        Tables() { Isa::use_faster_dots(of); }
    };
    static const Tables tables;
    return tables.of[static_cast<int>(format)];
}

}  // namespace kt::KT_ISA
