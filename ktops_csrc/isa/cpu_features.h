#pragma once

#include <string>

namespace kt::cpu {

// Each asks CPUID for the instructions of one row of kernels and XCR0 for the registers they need.
bool has_x86_64();
bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx_bf16();  // and whether the operating system lets this process use tiles; asks it once

// Whether VDPBF16PS does fewer FLOP/s than multiplying and adding in float32: half as many on Intel's cores since AMX
// took its place (measured on one), against twice as many on Cooper Lake and on AMD's. By name, not by a measurement:
// the same CPU must always choose the same kernels.
bool slow_bfloat16_dot();

// Why the operating system keeps this process from tiles that the CPU has; empty if it does not, or there are none.
std::string tiles_refused();

}  // namespace kt::cpu
