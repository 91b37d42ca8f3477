#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace kt {

// Runs body(context) on up to n threads at once, at least once. Supplied by the caller of the kernels.
using Launch = void (*)(int64_t n, void (*body)(void* context), void* context);

// A list of phases, each a number of independent tasks; a phase starts when the one before has ended. Tasks are handed
// out one by one, so a thread that loses its core, or never gets one, delays the others by the task it holds at most.
class Schedule {
public:
    static constexpr int kMaxPhases = 12;

    // task(i, thread) for i in [0, num_tasks) and thread in [0, num_threads). The task is referenced, not copied.
    template <class Task>
    void add(int64_t num_tasks, const Task& task) {
        Phase& phase = phases_[num_phases_++];
        phase.num_tasks = num_tasks;
        phase.task = &task;
        phase.call = [](const void* t, int64_t i, int thread) { (*static_cast<const Task*>(t))(i, thread); };
    }

    // Region: constructed and destroyed by every thread around its work.
    template <class Region>
    void run(int num_threads, Launch launch) {
        const auto work = [](void* self) {
            [[maybe_unused]] const Region region{};
            static_cast<Schedule*>(self)->work();
        };
        launch(num_threads, work, this);
    }

private:
    struct Phase {
        int64_t num_tasks = 0;
        const void* task = nullptr;
        void (*call)(const void*, int64_t, int) = nullptr;
        alignas(64) std::atomic<int64_t> next{0};
        alignas(64) std::atomic<int64_t> done{0};
    };

    void work() {
        const int thread = num_workers_.fetch_add(1);
        for (int p = 0; p < num_phases_; ++p) {
            Phase& phase = phases_[p];
            int64_t finished = 0;
            for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.num_tasks; ++finished) {
                phase.call(phase.task, i, thread);
            }
            if (finished) phase.done.fetch_add(finished, std::memory_order_release);
            wait(phase);
        }
    }

    static void wait(const Phase& phase) {
        constexpr int kSpins = 2000;  // about 50 microseconds; then give the core to whoever holds the last task
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
    std::atomic<int> num_workers_{0};
};

}  // namespace kt
