#include "core/huge_pages.h"
#include "core/workspace.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace kt::ops {

void empty_cache() { empty_workspaces(); }

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats() {
    const WorkspaceStats stats = workspace_stats();
    return {stats.in_use, stats.idle, stats.peak, stats.blocks, stats.allocations};
}

void ask_for_huge_pages(Tensor tensor) {
    const Checker check("kt::ask_for_huge_pages");
    check.require(tensor.is_contiguous(), "tensor must be contiguous, got one of shape ", tensor, " that is not");
    kt::ask_for_huge_pages(tensor.mutable_data_ptr(), bytes_of(tensor));
}

}  // namespace kt::ops
