#pragma once

#include <string>

namespace kt::cpu {

// has_<isa>: true if CPUID reports the instructions of the ISA and XCR0 the registers they need. The one for tiles also
// asks the operating system, once, for permission to use them.
#define KT_ROW(name) bool has_##name();
#include "isa/rows.def"
#undef KT_ROW

// True if VDPBF16PS does fewer FLOP/s than multiply-adds in float32: half as many on Intel's cores since AMX replaced
// it (measured on one), against twice as many on Cooper Lake and on AMD's. Decided by name, not by measurement: the
// same CPU must always choose the same kernels.
bool slow_bfloat16_dot();

// The reason why the operating system denies this process the CPU's tiles; empty if it doesn't, or the CPU has none.
std::string tiles_refused();

}  // namespace kt::cpu
