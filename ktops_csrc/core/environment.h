#pragma once

#include <string>

namespace kt::environment {

// KTOPS_ISA: the ISA whose kernels are used until dispatch::use() chooses others; empty for the default.
std::string isa();

// KTOPS_ISA_UNCHECKED=1: do not check that the CPU supports the ISA (for emulators).
bool isa_unchecked();

// KTOPS_PROFILE=1: record the time of every step from the start.
bool profile();

}  // namespace kt::environment
