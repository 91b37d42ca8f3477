#pragma once

namespace kt::cpu {

// Each asks CPUID for the instructions of one row of kernels and XCR0 for the registers they need.
bool has_x86_64();
bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx_bf16();  // and whether the kernel lets this process use tiles; asks it once

}  // namespace kt::cpu
