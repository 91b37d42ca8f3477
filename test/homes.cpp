// The homes of tasks, and the order in which threads of several nodes take them.
//
//   homes slabs ROWS WIDTH STEP SHARE...
//       prints kt::width_within_nodes(), the number of slabs of WIDTH rows, and the first slab of every node
//   homes after GROUPS ROWS WIDTH SHARE...
//       exit status 1: with as many threads as nodes, which have equal shares, kt::Homes::after() is not the node's
//       next task
//   homes run MODE THREADS GROUPS ROWS WIDTH SHARE...
//       runs two phases of GROUPS groups of slabs, thread i on node i modulo the number of nodes, and prints for each
//       phase "tasks at_home stolen" as profiled, then for each thread the tasks that it ran. MODE is
//         free   threads take tasks as they come
//         even   every thread waits in each task until all threads are in one of the same rank
//         held   the first task of a thread of another node than 0 lasts until all other tasks are done; threads of
//                node 0 begin when all of these have one
//       Exit status 1: a thread waited too long; 2: a task ran twice or never.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "launch.h"
#include "parallel/schedule.h"

namespace {

int num_nodes, num_threads;
std::atomic<int> num_regions{0};
thread_local int own_node = 0;

struct OnNode {
    OnNode() { own_node = num_regions++ % num_nodes; }
};

void wait_for(const std::atomic<int64_t>& number, int64_t least) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (number < least) {
        if (std::chrono::steady_clock::now() > deadline) std::_Exit(1);
        std::this_thread::yield();
    }
}

struct Phase {
    std::atomic<int64_t> finished{0}, holding{0}, begun{0};
    std::vector<std::atomic<int>> runs;
    std::vector<std::vector<int64_t>> by_thread;

    explicit Phase(int64_t tasks) : runs(static_cast<size_t>(tasks)), by_thread(static_cast<size_t>(num_threads)) {}

    int64_t tasks() const { return static_cast<int64_t>(runs.size()); }

    void run(const char* mode, int64_t i, int thread) {
        auto& own = by_thread[static_cast<size_t>(thread)];
        if (!std::strcmp(mode, "even")) {
            const auto rank = static_cast<int64_t>(own.size());
            ++begun;
            wait_for(begun, num_threads * (rank + 1));
        } else if (!std::strcmp(mode, "held") && own.empty()) {
            const int64_t held = num_threads - (num_threads + num_nodes - 1) / num_nodes;  // threads of other nodes
            if (own_node) {
                ++holding;
                wait_for(finished, tasks() - held);
            } else {
                wait_for(holding, held);
            }
        }
        own.push_back(i);
        ++runs[static_cast<size_t>(i)];
        ++finished;
    }
};

int print_slabs(int64_t rows, int64_t width, int64_t step) {
    const kt::Homes homes = kt::homes_of_slabs(rows, width);
    std::printf("%lld %lld", static_cast<long long>(kt::width_within_nodes(rows, width, step)),
                static_cast<long long>(homes.slabs));
    for (int n = 0; n < homes.nodes; ++n) std::printf(" %lld", static_cast<long long>(homes.first[n]));
    std::printf("\n");
    return 0;
}

int check_after(int64_t groups, int64_t rows, int64_t width) {
    const kt::Homes homes = kt::homes_of_slabs(rows, width);
    const int64_t tasks = groups * homes.slabs;
    for (int n = 0; n < homes.nodes; ++n) {
        const int64_t count = homes.count(n, tasks);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t after = homes.after(homes.task(n, i), num_nodes);
            if (i + 1 < count ? after != homes.task(n, i + 1) : after < tasks) return 1;
        }
    }
    return 0;
}

int run(const char* mode, int64_t groups, int64_t rows, int64_t width) {
    const kt::Homes homes = kt::homes_of_slabs(rows, width);
    const int64_t tasks = groups * ((rows + width - 1) / width);
    Phase first(tasks), second(tasks);
    const auto run_first = [&](int64_t i, int thread) { first.run(mode, i, thread); };
    const auto run_second = [&](int64_t i, int thread) { second.run(mode, i, thread); };
    kt::profile::set_enabled(true);
    {
        const kt::profile::Call call("op");
        kt::Schedule schedule;
        schedule.add("first", tasks, run_first, homes);
        schedule.add("second", tasks, run_second, homes);
        schedule.run<OnNode>(num_threads, start_threads);
    }
    const char* const no_paths[kt::profile::kMaxPaths] = {};
    std::printf("%s", kt::profile::describe(no_paths).c_str());
    for (const Phase* phase : {&first, &second}) {
        for (const auto& runs : phase->runs) {
            if (runs != 1) return 2;
        }
        for (const auto& own : phase->by_thread) {
            for (int64_t i : own) std::printf("%lld ", static_cast<long long>(i));
            std::printf("\n");
        }
    }
    return 0;
}

}  // namespace

int kt::current_node() { return own_node; }

int main(int, char** argv) {
    const bool runs = !std::strcmp(argv[1], "run");
    char** numbers = argv + (runs ? 4 : 2);
    int64_t sizes[3];
    for (int64_t& size : sizes) size = std::atoll(*numbers++);
    std::vector<int64_t> shares;
    while (*numbers) shares.push_back(std::atoll(*numbers++));
    num_nodes = static_cast<int>(shares.size());
    kt::set_nodes({}, shares);
    if (runs) {
        num_threads = std::atoi(argv[3]);
        return run(argv[2], sizes[0], sizes[1], sizes[2]);
    }
    return !std::strcmp(argv[1], "after") ? check_after(sizes[0], sizes[1], sizes[2])
                                          : print_slabs(sizes[0], sizes[1], sizes[2]);
}
