// The Region and the launch function that test programs pass to kt::Schedule::run.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

struct Region {};

inline void start_threads(int64_t n, void (*body)(void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context);
    for (std::thread& thread : threads) thread.join();
}
