#pragma once

// The thread that computes calls. CUDA runs host functions on a thread of its own, which must neither be kept busy nor
// get threads of OpenMP.

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

namespace kt::streams {

// What the worker runs, each time that it is submitted.
class Task {
public:
    virtual ~Task() = default;

    // On the worker's thread. Exceptions are kept for Worker::take_error().
    virtual void run() = 0;
    // After run(), or after its exception. The last access by the worker.
    virtual void finished() = 0;

private:
    friend class Worker;
    std::atomic<bool> pending_{false};  // submitted, and not yet computed
};

class Worker {
public:
    // Starts the thread, if it does not run for this number of threads of PyTorch: a thread that has called PyTorch
    // keeps the number of that time.
    void start(int num_threads);

    // From any thread. A task that was submitted before and is not computed yet is waited for.
    void submit(Task* task);
    // Returns once the task is computed.
    void wait(const Task* task);
    // Returns once all submitted tasks are computed.
    void wait_for_all();

    // Ends the thread after the task at hand. From then on, submit() and wait() do nothing.
    void stop();
    bool stopped() const;

    // Returns the message of the first exception since the last call, "" if there was none.
    std::string take_error();

private:
    void work();
    void end_thread();  // with the lock of starting_

    std::mutex starting_;  // orders start() and stop()
    std::thread thread_;
    int num_threads_ = 0;

    mutable std::mutex mutex_;
    std::condition_variable submitted_, computed_;
    std::deque<Task*> tasks_;  // the first may be running
    bool ending_ = false;      // the thread is asked to end
    bool stopped_ = false;
    std::string error_;
};

}  // namespace kt::streams
