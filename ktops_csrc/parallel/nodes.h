#pragma once

// The NUMA nodes over which the rows of weights are spread, and the tasks that read rows of one node.
//
// A matrix of R rows is cut into one part for each node: node n has the rows from R s(n) / s(N), rounded down, to
// R s(n + 1) / s(N), where s(n) is the sum of the shares of the nodes before n. Nothing else decides where rows are;
// ktops.numa_placement moves them there.

#include <cstdint>
#include <vector>

namespace kt {

constexpr int kMaxNodes = 32;

// Sets the nodes for the calls that begin afterward. node_of_cpu: for every CPU, the node in [0, shares.size()) whose
// tasks a thread takes first while it runs there. shares: of the rows, positive. With fewer than two nodes, no task has
// a home.
void set_nodes(const std::vector<int64_t>& node_of_cpu, const std::vector<int64_t>& shares);

// Returns the first row of each node's part of `rows` rows, and after them `rows`; empty without nodes.
std::vector<int64_t> first_rows(int64_t rows);

// Returns the node of the CPU that this thread runs on. In a separate file, current_node.cpp, because test/schedule.cpp
// decides it for its own threads.
int current_node();
int node_of_cpu(int cpu);

// Which node each task of a phase belongs to. In every group of `slabs` tasks, node n has [first[n], first[n + 1]).
struct Homes {
    int nodes = 0;  // 0: tasks have no home
    int64_t slabs = 0;
    int64_t first[kMaxNodes + 1] = {};

    int64_t width(int node) const { return first[node + 1] - first[node]; }
    // The number of a node's tasks, and the i-th of them.
    int64_t count(int node, int64_t num_tasks) const { return num_tasks / slabs * width(node); }
    int64_t task(int node, int64_t i) const { return i / width(node) * slabs + first[node] + i % width(node); }
    // The task that a thread most likely takes after `task`, since the other threads, spread over the nodes like the
    // rows, take those in between. It may be past the last.
    int64_t after(int64_t task, int64_t num_threads) const;
};

// Returns `width`, or a smaller multiple of `step`, by which the rows of the first node are divided nearly evenly. With
// equal shares, a task of that many rows then rarely reads rows of two nodes; with others, one at each boundary may.
int64_t width_within_nodes(int64_t rows, int64_t width, int64_t step);

// Returns the homes of tasks that each read `width` rows of a matrix, the last one of a group those that are left. A
// task belongs to the node of its middle row.
Homes homes_of_slabs(int64_t rows, int64_t width);

}  // namespace kt
