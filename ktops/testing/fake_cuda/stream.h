#pragma once

// A stream: a thread that executes operations in order.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace fake {

[[noreturn]] inline void misuse(const std::string& reason) {
    std::fprintf(stderr, "fake_cuda: %s\n", reason.c_str());
    std::fflush(stderr);
    std::abort();
}

// True on a thread that runs a function of the program, which must not call CUDA.
inline thread_local bool in_host_function = false;

inline void call_host_function(void (*function)(void*), void* argument) {
    in_host_function = true;
    function(argument);
    in_host_function = false;
}

// Random delays in microseconds, the same for a seed as far as threads allow.
class Delays {
public:
    void set(unsigned seed, unsigned longest) {
        std::lock_guard<std::mutex> lock(mutex_);
        random_.seed(seed);
        longest_ = longest;
    }
    std::chrono::microseconds next() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!longest_ || random_() % 2) return {};
        return std::chrono::microseconds(random_() % longest_);
    }

private:
    std::mutex mutex_;
    std::mt19937 random_;
    unsigned longest_ = 0;
};

struct Operation {
    std::function<void()> run;
    const void* pinned = nullptr;  // memory that it uses
};

// Counts to n, which others wait for. Blocks streams, and is an event.
class Counter {
public:
    void reach(uint64_t n) {
        std::lock_guard<std::mutex> lock(mutex_);
        value_ = std::max(value_, n);
        changed_.notify_all();
    }
    void wait(uint64_t n) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return value_ >= n; });
    }

    uint64_t expected = 0;  // guarded by the driver

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    uint64_t value_ = 0;
};

struct Graph;
class Stream;

// How many operations of each captured stream come first.
using Order = std::map<const Stream*, size_t>;

class Stream {
public:
    Stream(int of_device, Delays& delays) : device(of_device), delays_(delays), thread_([this] { work(); }) {
        thread_.detach();
    }

    void push(Operation operation) {
        std::lock_guard<std::mutex> lock(mutex_);
        operations_.push_back(std::move(operation));
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return operations_.empty(); });
    }
    bool uses(const char* begin, const char* end) {
        std::lock_guard<std::mutex> lock(mutex_);
        return std::any_of(operations_.begin(), operations_.end(), [&](const Operation& operation) {
            return operation.pinned >= begin && operation.pinned < end;
        });
    }

    void leave_capture() {
        captured = nullptr;
        order.clear();
        invalidated = false;
    }

    const int device;
    Counter unblocked;
    Graph* captured = nullptr;  // guarded by the driver, like the next four
    Order order;                // of what is captured next
    unsigned long long capture_id = 0;
    int capture_mode = 0;
    bool invalidated = false;

private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] { return !operations_.empty(); });
            const auto run = operations_.front().run;
            lock.unlock();
            std::this_thread::sleep_for(delays_.next());
            run();
            lock.lock();
            operations_.pop_front();
            changed_.notify_all();
        }
    }

    Delays& delays_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Operation> operations_;  // the first may be running
    std::thread thread_;
};

}  // namespace fake
