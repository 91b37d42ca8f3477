#include "parallel/profile.h"

#include "gemm/path.h"
#include "ops/ops.h"

namespace kt::ops {

bool set_profiling(bool enabled) { return profile::set_enabled(enabled); }

bool profiling() { return profile::enabled(); }

std::string profiled_steps() { return profile::describe(kPathNames); }

}  // namespace kt::ops
