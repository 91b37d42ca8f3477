#include "parallel/nodes.h"

#include <atomic>
#include <cstddef>

namespace kt {
namespace {

struct Nodes {
    std::vector<int64_t> node_of_cpu, shares_before;  // shares_before: one more than there are nodes

    int count() const { return static_cast<int>(shares_before.size()) - 1; }
    int64_t first_row(int node, int64_t rows) const {
        return rows * shares_before[static_cast<size_t>(node)] / shares_before.back();
    }
};

std::atomic<const Nodes*> current{nullptr};  // never freed: calls in progress may read the one before

}  // namespace

void set_nodes(const std::vector<int64_t>& node_of_cpu, const std::vector<int64_t>& shares) {
    if (shares.size() < 2) return current.store(nullptr);
    auto* nodes = new Nodes{node_of_cpu, {0}};
    for (int64_t share : shares) nodes->shares_before.push_back(nodes->shares_before.back() + share);
    current.store(nodes);
}

std::vector<int64_t> first_rows(int64_t rows) {
    std::vector<int64_t> first;
    if (const Nodes* nodes = current.load()) {
        for (int n = 0; n <= nodes->count(); ++n) first.push_back(nodes->first_row(n, rows));
    }
    return first;
}

int node_of_cpu(int cpu) {
    const Nodes* nodes = current.load(std::memory_order_acquire);
    if (!nodes || cpu < 0 || static_cast<size_t>(cpu) >= nodes->node_of_cpu.size()) return 0;
    return static_cast<int>(nodes->node_of_cpu[static_cast<size_t>(cpu)]);
}

int64_t Homes::after(int64_t task, int64_t num_threads) const {
    if (!nodes) return task + num_threads;
    const int64_t slab = task % slabs;
    int node = 0;
    while (slab >= first[node + 1]) ++node;
    const int64_t threads = (num_threads * width(node) + slabs / 2) / slabs;  // rounded
    const int64_t i = task / slabs * width(node) + slab - first[node];
    return this->task(node, i + (threads > 1 ? threads : 1));
}

int64_t width_within_nodes(int64_t rows, int64_t width, int64_t step) {
    const Nodes* nodes = current.load(std::memory_order_acquire);
    const int64_t part = nodes ? nodes->first_row(1, rows) : 0;
    if (part == 0) return width;
    const int64_t slabs = (part + width - 1) / width, even = (part + slabs - 1) / slabs;
    const int64_t rounded = (even + step - 1) / step * step;
    return rounded < width ? rounded : width;
}

Homes homes_of_slabs(int64_t rows, int64_t width) {
    Homes homes;
    const Nodes* nodes = current.load(std::memory_order_acquire);
    if (!nodes) return homes;
    homes.nodes = nodes->count();
    homes.slabs = rows > width ? (rows + width - 1) / width : 1;
    for (int n = 1; n < homes.nodes; ++n) {
        const int64_t end = nodes->first_row(n, rows);
        int64_t slab = homes.first[n - 1];
        const auto middle = [&](int64_t s) {
            const int64_t left = rows - s * width;
            return s * width + (left < width ? left : width) / 2;
        };
        while (slab < homes.slabs && middle(slab) < end) ++slab;
        homes.first[n] = slab;
    }
    homes.first[homes.nodes] = homes.slabs;
    return homes;
}

}  // namespace kt
