#include "streams/worker.h"

#include <exception>

namespace kt::streams {

void Worker::start(int num_threads) {
    std::lock_guard<std::mutex> starting(starting_);
    if (stopped() || num_threads == num_threads_) return;
    end_thread();
    thread_ = std::thread([this] { work(); });
    num_threads_ = num_threads;
}

void Worker::end_thread() {
    if (!thread_.joinable()) return;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    submitted_.notify_all();
    thread_.join();
    ending_ = false;
}

void Worker::submit(Task* task) {
    std::unique_lock<std::mutex> lock(mutex_);
    computed_.wait(lock, [&] { return stopped_ || !task->pending_; });
    if (stopped_) return;
    task->pending_ = true;
    tasks_.push_back(task);
    lock.unlock();
    submitted_.notify_one();
}

void Worker::wait(const Task* task) {
    constexpr int kSpins = 2000;  // about 50 microseconds, the time of a wakeup
    for (int spin = 0; spin < kSpins; ++spin) {
        if (!task->pending_.load(std::memory_order_acquire)) return;
        __builtin_ia32_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    computed_.wait(lock, [&] { return stopped_ || !task->pending_; });
}

void Worker::wait_for_all() {
    std::unique_lock<std::mutex> lock(mutex_);
    computed_.wait(lock, [&] { return stopped_ || tasks_.empty(); });
}

void Worker::stop() {
    std::lock_guard<std::mutex> starting(starting_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
    }
    computed_.notify_all();
    end_thread();
}

bool Worker::stopped() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return stopped_;
}

std::string Worker::take_error() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string error;
    error.swap(error_);
    return error;
}

void Worker::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        submitted_.wait(lock, [&] { return ending_ || !tasks_.empty(); });
        if (ending_) return;
        Task* task = tasks_.front();
        lock.unlock();
        std::string error;
        try {
            task->run();
        } catch (const std::exception& exception) {
            error = exception.what();
        }
        lock.lock();
        if (error_.empty()) error_ = error;
        tasks_.pop_front();
        task->pending_.store(false, std::memory_order_release);
        computed_.notify_all();
        lock.unlock();
        task->finished();
        lock.lock();
    }
}

}  // namespace kt::streams
