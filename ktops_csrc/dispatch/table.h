#pragma once

// The kernels of every ISA (isa/rows.def). Those of the first ISA that the CPU supports are used.

#include <string>

#include "moe/problem.h"
#include "quantize/problem.h"

namespace kt {

// Kernels for one element type.
struct MoeKernels {
    void (*forward)(const Problem&, const ForwardResults&);
    void (*backward)(const BackwardProblem&);
    double (*peak)(int64_t iterations);          // FLOP/s of one thread: of its multiply-adds alone
    double (*peak_from_l2)(int64_t iterations);  // and of products with operands from L2
};

struct IsaRow {
    const char* name;
    bool (*supported)();
    MoeKernels bfloat16, float16, float32, float64;
    double (*peak_int8)(int64_t iterations);
    // Decodes rows [row, row + n) of expert e of a weight in a format, `columns` floats each.
    void (*decode_rows)(const WeightTensor&, int64_t e, int64_t row, int64_t n, float* out);
    void (*quantize)(const QuantizeProblem&);
    // The reason why the operating system forbids what the CPU supports; empty if it does not.
    std::string (*refused)() = nullptr;

    const MoeKernels& kernels(DType dtype) const {
        switch (dtype) {
            case DType::kBFloat16:
                return bfloat16;
            case DType::kFloat16:
                return float16;
            case DType::kFloat32:
                return float32;
            case DType::kFloat64:
                break;
        }
        return float64;
    }
};

// The scalar kernels compute float64 for every ISA.
void forward_float64(const Problem& problem, const ForwardResults& results);
void backward_float64(const BackwardProblem& problem);

#define KT_ROW(name) extern const IsaRow name##_row;
#include "isa/rows.def"
#undef KT_ROW

namespace dispatch {

// Returns the kernels in use. The first call chooses them: those of KTOPS_ISA, else the first supported ones.
const IsaRow& current();

// Throws std::runtime_error, naming `argument`, for an unknown ISA or one that this CPU cannot run.
const IsaRow& find(const std::string& name, const char* argument);
void use(const std::string& name);

// Returns "name=1,name=0,...": every ISA, best first, and whether this CPU can run it.
std::string describe();

// Returns "name: reason; ..." for the ISAs that the CPU supports, that are better than the one chosen by default, and
// that the operating system forbids. Empty if there are none, or if KTOPS_ISA is set.
std::string refused();

}  // namespace dispatch
}  // namespace kt
