#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "parallel/nodes.h"
#include "parallel/profile.h"

namespace kt {

// Runs body(context) on up to n threads at once, at least once. Supplied by the caller of the kernels.
using Launch = void (*)(int64_t n, void (*body)(void* context), void* context);

// A list of phases, each a set of independent tasks. A phase starts when the one before it has ended. Threads take
// tasks one by one, so a thread that loses its core, or never gets one, delays the others by at most one task. If tasks
// have homes, threads take those of their own node first, then those that are left of other nodes.
class Schedule {
public:
    static constexpr int kMaxPhases = 12;

    // Adds a phase that calls task(i, thread) for every i in [0, num_tasks), thread in [0, num_threads). The task is
    // referenced, not copied. name: a literal, the step's name in profiles. Throws std::logic_error after kMaxPhases.
    // The homes are referenced, too.
    template <class Task>
    void add(const char* name, int64_t num_tasks, const Task& task, const Homes& homes) {
        add(name, num_tasks, task);
        if (!homes.nodes) return;
        Phase& phase = phases_[num_phases_ - 1];
        phase.homes = &homes;
        for (int node = 0; node < homes.nodes; ++node) phase.queues[node].next.store(0, std::memory_order_relaxed);
    }

    template <class Task>
    void add(const char* name, int64_t num_tasks, const Task& task) {
        if (num_phases_ == kMaxPhases) throw std::logic_error("kt: more than kMaxPhases phases");
        Phase& phase = phases_[num_phases_++];
        phase.name = name;
        phase.num_tasks = num_tasks;
        phase.task = &task;
        phase.call = [](const void* t, int64_t i, int thread) { (*static_cast<const Task*>(t))(i, thread); };
    }

    // Every thread constructs a Region before its work and destroys it afterward.
    template <class Region>
    void run(int num_threads, Launch launch) {
        const auto work = [](void* self) {
            [[maybe_unused]] const Region region{};
            static_cast<Schedule*>(self)->work();
        };
        call_ = profile::Call::current();
        if (call_) call_->mark("prepare");
        launch(num_threads, work, this);
        if (call_) record();
    }

private:
    struct alignas(64) Queue {
        std::atomic<int64_t> next;
    };

    struct Phase {
        const char* name = nullptr;
        int64_t num_tasks = 0;
        const void* task = nullptr;
        void (*call)(const void*, int64_t, int) = nullptr;
        const Homes* homes = nullptr;
        Queue queues[kMaxNodes];  // of the tasks of each node, if they have homes
        alignas(64) std::atomic<int64_t> next{0};
        alignas(64) std::atomic<int64_t> done{0};
        alignas(64) std::atomic<int64_t> busy{0};  // nanoseconds, if the call is profiled
        std::atomic<int64_t> wait{0};
        std::atomic<int64_t> stolen{0};
        std::atomic<int64_t> paths[profile::kMaxPaths] = {};
        int64_t wall = 0;  // as measured by the first worker, which is present from the start
    };

    void work() {
        const int thread = num_workers_.fetch_add(1);
        for (int p = 0; p < num_phases_; ++p) {
            Phase& phase = phases_[p];
            const int64_t begin = call_ ? profile::now() : 0;
            profile::PathCounts paths{};
            profile::path_counts = call_ ? &paths : nullptr;
            int64_t finished = 0, stolen = 0;
            if (phase.homes) {
                finished = take_by_home(phase, thread, stolen);
            } else {
                for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.num_tasks; ++finished)
                    phase.call(phase.task, i, thread);
            }
            const int64_t end = call_ ? profile::now() : 0;
            // A locked instruction, which orders stores past the caches, too; release alone does not.
            if (finished) phase.done.fetch_add(finished, std::memory_order_release);
            wait(phase);
            if (call_) count(phase, thread, begin, end, paths);
            if (call_) phase.stolen.fetch_add(stolen, std::memory_order_relaxed);
        }
        profile::path_counts = nullptr;
    }

    // Runs tasks until none is left, those of the thread's own node first. Returns how many, and adds to `stolen` those
    // of other nodes.
    static int64_t take_by_home(Phase& phase, int thread, int64_t& stolen) {
        const Homes& homes = *phase.homes;
        const int own = current_node();
        int64_t finished = 0;
        for (int n = 0; n < homes.nodes; ++n) {
            const int node = (own + n) % homes.nodes;
            const int64_t count = homes.count(node, phase.num_tasks), before = finished;
            std::atomic<int64_t>& next = phase.queues[node].next;
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++finished)
                phase.call(phase.task, homes.task(node, i), thread);
            if (n) stolen += finished - before;
        }
        return finished;
    }

    static void count(Phase& phase, int thread, int64_t begin, int64_t end, const profile::PathCounts& paths) {
        const int64_t left = profile::now();
        phase.busy.fetch_add(end - begin, std::memory_order_relaxed);
        phase.wait.fetch_add(left - end, std::memory_order_relaxed);
        if (thread == 0) phase.wall = left - begin;
        for (size_t p = 0; p < paths.size(); ++p) phase.paths[p].fetch_add(paths[p], std::memory_order_relaxed);
    }

    void record() {
        for (int p = 0; p < num_phases_; ++p) {
            const Phase& phase = phases_[p];
            profile::Step step{1, phase.num_tasks, phase.busy, phase.wait, phase.wall, {}};
            for (size_t i = 0; i < step.paths.size(); ++i) step.paths[i] = phase.paths[i];
            if (phase.homes) {
                step.stolen = phase.stolen;
                step.at_home = phase.num_tasks - step.stolen;
            }
            call_->add(phase.name, step);
        }
        call_->mark("launch", false);
    }

    static void wait(const Phase& phase) {
        constexpr int kSpins = 2000;  // about 50 microseconds; then yield the core to a thread that holds a last task
        for (int spin = 0; phase.done.load(std::memory_order_acquire) < phase.num_tasks; ++spin) {
            if (spin < kSpins) {
                __builtin_ia32_pause();
            } else {
                sched_yield();
            }
        }
    }

    Phase phases_[kMaxPhases];
    int num_phases_ = 0;
    profile::Call* call_ = nullptr;
    std::atomic<int> num_workers_{0};
};

}  // namespace kt
