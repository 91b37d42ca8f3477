#pragma once

#include <string>

namespace kt::cpu {

// has_<row>: each asks CPUID for the instructions of one row of kernels and XCR0 for the registers they need; that of
// tiles also asks, once, whether the operating system lets this process use them.
#define KT_ROW(name) bool has_##name();
#include "isa/rows.def"
#undef KT_ROW

// Whether VDPBF16PS does fewer FLOP/s than multiplying and adding in float32: half as many on Intel's cores since AMX
// took its place (measured on one), against twice as many on Cooper Lake and on AMD's. By name, not by a measurement:
// the same CPU must always choose the same kernels.
bool slow_bfloat16_dot();

// Why the operating system keeps this process from tiles that the CPU has; empty if it does not, or there are none.
std::string tiles_refused();

}  // namespace kt::cpu
