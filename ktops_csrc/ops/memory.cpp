#include "core/huge_pages.h"
#include "core/workspace.h"
#include "ops/checks.h"

namespace kt::ops {

void empty_cache() { empty_workspaces(); }

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats() {
    const WorkspaceStats stats = workspace_stats();
    return {stats.in_use, stats.idle, stats.peak, stats.blocks, stats.allocations};
}

void ask_for_huge_pages(Tensor tensor) {
    Checker("kt::ask_for_huge_pages").require(tensor.is_contiguous(), "tensor must be contiguous");
    kt::ask_for_huge_pages(tensor.mutable_data_ptr(), bytes_of(tensor));
}

}  // namespace kt::ops
