#include "core/workspace.h"
#include "ops/ops.h"

namespace kt::ops {

void empty_cache() { empty_workspaces(); }

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats() {
    const WorkspaceStats stats = workspace_stats();
    return {stats.in_use, stats.idle, stats.peak, stats.blocks, stats.allocations};
}

}  // namespace kt::ops
