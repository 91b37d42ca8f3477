#pragma once

#include <string>

namespace kt::cpu {

// has_<isa>: true if CPUID reports the instructions of the ISA and XCR0 the registers that they need. has_amx_bf16 also
// asks the operating system, once, for permission to use tiles.
#define KT_ROW(name) bool has_##name();
#include "isa/rows.def"
#undef KT_ROW

// The same for instructions that are not a row of their own.
bool has_avx512_vbmi();

// True if VDPBF16PS does fewer FLOP/s than multiply-adds in float32. On Intel cores with AMX it does half as many
// (measured on one); on Cooper Lake and AMD cores, twice as many. Decided by vendor and model, not by measurement,
// since the same CPU must always choose the same kernels.
bool slow_bfloat16_dot();

// Returns why the operating system denies this process the CPU's tiles; empty if it doesn't, or if the CPU has none.
std::string tiles_refused();

}  // namespace kt::cpu
