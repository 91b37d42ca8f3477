#pragma once

#include <string>

namespace kt::cpu {

// Each asks CPUID for the instructions of one row of kernels and XCR0 for the registers they need.
bool has_x86_64();
bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx_bf16();  // and whether the operating system lets this process use tiles; asks it once

// Why the operating system keeps this process from tiles that the CPU has; empty if it does not, or there are none.
std::string tiles_refused();

}  // namespace kt::cpu
