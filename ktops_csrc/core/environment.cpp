#include "core/environment.h"

#include <cstdlib>

namespace kt::environment {

static std::string variable(const char* name) {
    const char* value = std::getenv(name);
    return value ? value : "";
}

std::string isa() { return variable("KTOPS_ISA"); }

bool isa_unchecked() { return variable("KTOPS_ISA_UNCHECKED") == "1"; }

bool profile() { return variable("KTOPS_PROFILE") == "1"; }

}  // namespace kt::environment
