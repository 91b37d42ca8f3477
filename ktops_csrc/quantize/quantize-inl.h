#pragma once

// Quantizes a problem's rows, some per task.

#include <cstdint>

#include "core/workspace.h"
#include "parallel/schedule.h"
#include "quantize/floating-inl.h"
#include "quantize/gguf_blocks-inl.h"
#include "quantize/integer-inl.h"
#include "quantize/k_quants-inl.h"
#include "quantize/problem.h"

namespace kt::KT_ISA {

template <class Quantizer>
inline void quantize_rows(const QuantizeProblem& p) {
    Workspace counting;
    Quantizer(p, counting);
    Workspace workspace(counting.bytes());
    const Quantizer quantizer(p, workspace);
    const int64_t blocks = ceil_div(p.rows, Quantizer::kRows);
    const auto task = [&](int64_t i, int thread) {
        const int64_t row = i % blocks * Quantizer::kRows;
        quantizer(i / blocks, row, smaller(Quantizer::kRows, p.rows - row), thread);
    };
    struct NoRegion {};
    Schedule schedule;
    schedule.add("quantize", p.experts * blocks, task);
    schedule.run<NoRegion>(p.num_threads, p.launch);
}

void quantize(const QuantizeProblem& p) {
    switch (p.format) {
        case FormatId::int8:
            return quantize_rows<IntegerRows<Symmetric<127>>>(p);
        case FormatId::int4:
            return quantize_rows<IntegerRows<Symmetric<7>>>(p);
        case FormatId::uint4:
            return quantize_rows<IntegerRows<Affine>>(p);
        case FormatId::fp8_e4m3:
            return quantize_rows<Fp8Rows>(p);
        case FormatId::mxfp8:
            return quantize_rows<MicroscalingRows<false>>(p);
        case FormatId::mxfp4:
            return quantize_rows<MicroscalingRows<true>>(p);
        case FormatId::q4_0:
            return quantize_rows<GgufRows<UnsignedBlock<4, false>>>(p);
        case FormatId::q4_1:
            return quantize_rows<GgufRows<UnsignedBlock<4, true>>>(p);
        case FormatId::q5_0:
            return quantize_rows<GgufRows<UnsignedBlock<5, false>>>(p);
        case FormatId::q5_1:
            return quantize_rows<GgufRows<UnsignedBlock<5, true>>>(p);
        case FormatId::q8_0:
            return quantize_rows<GgufRows<SignedBlock>>(p);
        case FormatId::q2_k:
            return quantize_rows<KQuantRows<Q2K>>(p);
        case FormatId::q3_k:
            return quantize_rows<KQuantRows<Q3K>>(p);
        case FormatId::q4_k:
            return quantize_rows<KQuantRows<Q4K>>(p);
        case FormatId::q5_k:
            return quantize_rows<KQuantRows<Q5K>>(p);
        case FormatId::q6_k:
            return quantize_rows<KQuantRows<Q6K>>(p);
        default:
            return;
    }
}

}  // namespace kt::KT_ISA
