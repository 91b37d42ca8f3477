#pragma once

#include <string>

namespace kt::environment {

// KTOPS_ISA: name of the row of kernels to start with; empty for the best one.
std::string isa();

// KTOPS_ISA_UNCHECKED=1: do not ask the CPU whether it can run the row (for emulators).
bool isa_unchecked();

// KTOPS_PROFILE=1: record the time of every step from the start.
bool profile();

}  // namespace kt::environment
