// Runs kt::Schedule with threads that are held up: a thread that takes one of the first HELD tasks of a phase stays in
// it until all other tasks of the phase are done. Arguments: THREADS HELD. Prints a line for each phase: the number of
// tasks done by each thread. Exit status 1: a held thread waited too long for tasks that no other thread took; 2: a
// task ran twice or never; 3: a task ran before the previous phase had ended. Without arguments: fills a schedule with
// phases and prints the error of one more.

#include "parallel/schedule.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "launch.h"

namespace {

constexpr int64_t kTasks = 100;
constexpr int kPhases = 3;
constexpr std::chrono::seconds kPatience{60};  // a longer wait means that a thread hangs

struct Phase {
    std::atomic<int64_t> finished{0};
    std::vector<std::atomic<int>> runs = std::vector<std::atomic<int>>(kTasks);
    std::vector<std::atomic<int>> by_thread;
};

void wait_for(const std::atomic<int64_t>& finished, int64_t number) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (finished < number) {
        if (std::chrono::steady_clock::now() > deadline) std::_Exit(1);
        std::this_thread::yield();
    }
}

int add_a_phase_too_many() {
    int done = 0;
    const auto task = [&done](int64_t, int) { ++done; };
    kt::Schedule schedule;
    for (int p = 0; p < kt::Schedule::kMaxPhases; ++p) schedule.add("phase", 1, task);
    try {
        schedule.add("phase", 1, task);
    } catch (const std::logic_error& error) {
        std::puts(error.what());
    }
    schedule.run<Region>(1, start_threads);
    return done == kt::Schedule::kMaxPhases ? 0 : 2;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 1) return add_a_phase_too_many();
    const int num_threads = std::atoi(argv[1]);
    const int64_t held = std::atoi(argv[2]);
    std::vector<Phase> phases(kPhases);
    std::vector<std::function<void(int64_t, int)>> tasks;
    for (int p = 0; p < kPhases; ++p) {
        phases[p].by_thread = std::vector<std::atomic<int>>(num_threads);
        tasks.emplace_back([&phases, held, p](int64_t i, int thread) {
            if (p && phases[p - 1].finished < kTasks) std::_Exit(3);
            if (i < held) wait_for(phases[p].finished, kTasks - held);
            ++phases[p].runs[i];
            ++phases[p].by_thread[thread];
            ++phases[p].finished;
        });
    }
    kt::Schedule schedule;
    for (const auto& task : tasks) schedule.add("phase", kTasks, task);
    schedule.run<Region>(num_threads, start_threads);
    for (Phase& phase : phases) {
        for (const auto& runs : phase.runs) {
            if (runs != 1) std::_Exit(2);
        }
        for (const auto& count : phase.by_thread) std::printf("%d ", count.load());
        std::printf("\n");
    }
}
