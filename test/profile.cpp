// Profiles one call of two phases with a clock that advances by kTaskTicks per task, by the other constants below
// during the rest of the call, and by one per reading. Argument: THREADS. Prints the lines of kt::profile::describe(),
// then the ticks from the first reading to the last. Every third task of the first phase counts path "b", the others
// path "a".

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "launch.h"
#include "parallel/schedule.h"

namespace {

constexpr int64_t kArgumentsTicks = 100, kPrepareTicks = 50, kTaskTicks = 1000, kFinishTicks = 70;
std::atomic<int64_t> ticks{0};

}  // namespace

namespace kt::profile {

int64_t now() { return ++ticks; }

}  // namespace kt::profile

int main(int, char** argv) {
    const auto task = [](int64_t, int) { ticks += kTaskTicks; };
    const auto counting_task = [&](int64_t i, int thread) {
        kt::profile::count_path(i % 3 == 2);
        task(i, thread);
    };
    const char* const path_names[kt::profile::kMaxPaths] = {"a", "b"};
    kt::profile::count_path(0);  // outside any step: not counted
    kt::profile::set_enabled(true);
    {
        const kt::profile::Call call("op");
        ticks += kArgumentsTicks;
        kt::profile::mark("arguments");
        ticks += kPrepareTicks;
        kt::Schedule schedule;
        schedule.add("first", 10, counting_task);
        schedule.add("second", 1, task);
        schedule.run<Region>(std::atoi(argv[1]), start_threads);
        ticks += kFinishTicks;
    }
    std::printf("%s%lld\n", kt::profile::describe(path_names).c_str(), static_cast<long long>(ticks - 1));
}
