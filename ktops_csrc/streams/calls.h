#pragma once

// Calls that a stream starts and collects, in its order, while Python goes on:
//
//   begin   copies of the inputs to pinned memory; a host function that hands the call to the worker
//   end     a host function that waits for the worker; a copy of the result to the device
//
// While the stream is captured, the same becomes part of a graph, and each launch of the graph computes the call anew.

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "streams/runtime.h"
#include "streams/staging.h"
#include "streams/worker.h"

namespace kt::streams {

// What a call computes. Destroyed on any thread: that of the worker, or for captured calls one of Python's.
class Work {
public:
    virtual ~Work() = default;
    virtual void run() = 0;
};

struct Input {
    void* host;
    const void* device;
    size_t bytes;
};
struct Result {
    void* host;
    size_t bytes;
};

class Call;

// The calls of the process. Its functions are for threads of Python, and may wait for CUDA.
class Calls {
public:
    explicit Calls(std::shared_ptr<const Runtime> runtime);

    // Starts to use the runtime at `path`, or for "" the one in this process. A forked child starts without calls.
    static void load(const std::string& path);
    static Calls* current();  // null before load()

    // Pinned memory for a call on the stream, which is one of the current device.
    Block stage(Stream stream, size_t bytes);
    // Enqueues a call and returns its number. The inputs' host memory and the result's are in the block.
    int64_t begin(Block block, std::initializer_list<Input> inputs, Result result, std::unique_ptr<Work> work,
                  int num_threads);
    // Enqueues the collection of a call, of exactly as many bytes, on the stream of its begin.
    void end(int64_t number, void* output, size_t bytes);
    // Instead of end: the result is not needed. Unknown numbers are ignored.
    void abandon(int64_t number);

    // Destroys finished calls. Throws if the worker caught an exception since the last time.
    void settle();
    // Waits for all calls, then settles.
    void synchronize();
    // Releases the memory of finished calls.
    void release();
    size_t staged_bytes() const { return staging_.bytes(); }

    // Lets everything that is enqueued pass without being computed. For the end of the process.
    void stop();

private:
    friend class Call;
    static void submit(void* call);
    static void wait(void* call);
    static void forget(void* call);

    void collect(Call* call, void* output);
    static void drop(Call* call);   // the caller gives up its result
    void add_finished(Call* call);  // from any thread
    void destroy_finished();

    std::shared_ptr<const Runtime> runtime_;
    Staging staging_;
    Worker worker_;

    std::mutex mutex_;
    std::unordered_map<int64_t, Call*> begun_;  // and not ended
    int64_t last_number_ = 0;

    std::atomic<Call*> finished_{nullptr};  // a list, linked by Call::next
};

}  // namespace kt::streams
