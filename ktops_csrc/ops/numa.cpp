#include "parallel/nodes.h"

#include "ops/checks.h"
#include "ops/ops.h"

namespace kt::ops {

void set_numa_nodes(std::vector<int64_t> node_of_cpu, std::vector<int64_t> shares) {
    constexpr int64_t kMostShares = 1 << 20;  // so that rows times shares do not overflow
    const Checker check("kt::set_numa_nodes");
    const auto nodes = static_cast<int64_t>(shares.size());
    check.require(nodes <= kMaxNodes, "shares must have at most ", int64_t{kMaxNodes}, " elements, got ", nodes);
    for (int64_t share : shares) {
        check.require(share > 0 && share <= kMostShares, "shares must be in [1, 2^20], got ", share);
    }
    for (int64_t node : node_of_cpu) {
        check.require(node >= 0 && node < nodes, "node_of_cpu must be in [0, ", nodes, "), got ", node);
    }
    set_nodes(node_of_cpu, shares);
}

std::vector<int64_t> numa_rows(int64_t rows) {
    Checker("kt::numa_rows").require(rows >= 0, "rows must not be negative, got ", rows);
    return first_rows(rows);
}

}  // namespace kt::ops
