#pragma once

// One row of kernels for each ISA (isa/rows.def); the first that the CPU supports is used.

#include <string>

#include "moe/problem.h"

namespace kt {

// Kernels for one element type.
struct MoeKernels {
    void (*forward)(const Problem&, const ForwardResults&);
    void (*backward)(const BackwardProblem&);
    double (*peak)(int64_t iterations);  // FLOP/s of one thread
};

struct IsaRow {
    const char* name;
    bool (*supported)();
    MoeKernels bfloat16, float32, float64;
    double (*peak_int8)(int64_t iterations);
    // Rows [row, row + n) of expert e of a weight in a format, `columns` floats each.
    void (*decode_rows)(const WeightTensor&, int64_t e, int64_t row, int64_t n, float* out);
    // Why the operating system forbids what the CPU could run; empty if it does not.
    std::string (*refused)() = nullptr;

    const MoeKernels& kernels(DType dtype) const {
        return dtype == DType::kBFloat16 ? bfloat16 : dtype == DType::kFloat32 ? float32 : float64;
    }
};

// float64 is computed by the scalar row on every machine.
void forward_float64(const Problem& problem, const ForwardResults& results);
void backward_float64(const BackwardProblem& problem);

#define KT_ROW(name) extern const IsaRow name##_row;
#include "isa/rows.def"
#undef KT_ROW

namespace dispatch {

// The row in use. The first call chooses it: KTOPS_ISA, else the first supported one.
const IsaRow& current();

// Throws std::runtime_error, in the name of `argument`, for an unknown row or one that this CPU lacks.
const IsaRow& find(const std::string& name, const char* argument);
void use(const std::string& name);

// "name=1,name=0,...": every row, best first, and whether this CPU can run it.
std::string describe();

// Which better rows than the one chosen without KTOPS_ISA the CPU could run if the operating system let it, and why it
// does not: "name: reason". Empty if there are none, or KTOPS_ISA is set.
std::string refused();

}  // namespace dispatch
}  // namespace kt
