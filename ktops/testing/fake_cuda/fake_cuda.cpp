// The functions of the CUDA runtime that ktops uses, without a GPU. A stream is a thread that executes copies, host
// functions and events in order, each after a random delay. "Device memory" is any memory that cudaHostAlloc did not
// return. What CUDA forbids or leaves undefined is an error of its function, or ends the process with a line on stderr:
// a function of CUDA called by a host function, pinned memory released while enqueued work or a graph uses it, or used
// without order in a graph.

#include "fake_cuda.h"

#include <cstring>

#include "driver.h"

#ifndef FAKE_CUDA_VERSION
#define FAKE_CUDA_VERSION 13000
#endif

namespace fake {

Driver& driver() {
    static auto* const instance = new Driver;
    return *instance;
}

int enter(const char* function) {
    if (in_host_function) misuse(std::string(function) + " is called by a host function");
    Driver& d = driver();
    std::lock_guard<std::mutex> lock(d.mutex);
    ++d.calls[function];
    const auto failure = d.failures.find(function);
    if (failure == d.failures.end()) return kSuccess;
    const int status = failure->second;
    d.failures.erase(failure);
    return result(status);
}

}  // namespace fake

using namespace fake;

extern "C" {

void fake_set_delays(unsigned seed, unsigned microseconds) { driver().delays.set(seed, microseconds); }

void fake_serialize_host_functions(int serialize) { driver().serialize_host_functions = serialize; }

void fake_fail(const char* function, int status) {
    std::lock_guard<std::mutex> lock(driver().mutex);
    driver().failures[function] = status;
}

int64_t fake_calls(const char* function) {
    std::lock_guard<std::mutex> lock(driver().mutex);
    return driver().calls[function];
}

int64_t fake_pinned_bytes() {
    std::lock_guard<std::mutex> lock(driver().mutex);
    size_t bytes = 0;
    for (const auto& block : driver().pinned) bytes += block.second;
    return static_cast<int64_t>(bytes);
}

void fake_block(void* handle) {
    Stream* stream = driver().find(handle);
    const uint64_t n = ++stream->unblocked.expected;
    driver().enqueue(stream, {[stream, n] { stream->unblocked.wait(n); }});
}

void fake_unblock(void* handle) {
    Stream* stream = driver().find(handle);
    stream->unblocked.reach(stream->unblocked.expected);
}

void fake_wait_for_destructors() { driver().destructors.wait(); }

void fake_drain_at_exit() {
    std::atexit([] {
        for (Stream* stream : driver().streams) {
            stream->unblocked.reach(stream->unblocked.expected);
            stream->wait();
        }
        driver().destructors.wait();
    });
}

int cudaGetDevice(int* device) {
    FAKE_ENTER();
    *device = current_device;
    return kSuccess;
}

int cudaSetDevice(int device) {
    FAKE_ENTER();
    if (device < 0 || device >= kDevices) return result(kInvalidDevice);
    current_device = device;
    return kSuccess;
}

int cudaRuntimeGetVersion(int* version) {
    FAKE_ENTER();
    *version = FAKE_CUDA_VERSION;
    return kSuccess;
}

int cudaGetLastError() {
    const int status = last_error;
    last_error = kSuccess;
    return status;
}

const char* cudaGetErrorString(int status) {
    switch (status) {
        case kInvalidValue:
            return "invalid argument";
        case kCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        default:
            return "unknown error";
    }
}

int cudaStreamCreate(void** stream) {
    FAKE_ENTER();
    std::lock_guard<std::mutex> lock(driver().mutex);
    *stream = driver().add_stream(current_device);
    return kSuccess;
}

int cudaStreamSynchronize(void* stream) {
    FAKE_ENTER();
    if (const int status = driver().check_captures()) return result(status);
    driver().find(stream)->wait();
    return kSuccess;
}

int cudaDeviceSynchronize() {
    FAKE_ENTER();
    if (const int status = driver().check_captures()) return result(status);
    std::set<Stream*> streams;
    {
        std::lock_guard<std::mutex> lock(driver().mutex);
        streams = driver().streams;
    }
    for (Stream* stream : streams) {
        if (stream->device == current_device) stream->wait();
    }
    return kSuccess;
}

int cudaHostAlloc(void** data, size_t bytes, unsigned) {
    FAKE_ENTER();
    if (const int status = driver().check_captures()) return result(status);
    *data = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(*data, 0xA5, bytes);
    std::lock_guard<std::mutex> lock(driver().mutex);
    driver().pinned[static_cast<char*>(*data)] = bytes;
    return kSuccess;
}

int cudaFreeHost(void* data) {
    FAKE_ENTER();
    if (const int status = driver().check_captures()) return result(status);
    Driver& d = driver();
    std::lock_guard<std::mutex> lock(d.mutex);
    const auto block = d.pinned.find(static_cast<char*>(data));
    if (block == d.pinned.end()) return result(kInvalidValue);
    const char *begin = block->first, *end = begin + block->second;
    for (Stream* stream : d.streams) {
        if (stream->uses(begin, end)) misuse("pinned memory is released while enqueued work uses it");
    }
    for (const Graph* graph : d.graphs) {
        for (const Operation& node : graph->nodes) {
            if (node.pinned >= begin && node.pinned < end) misuse("pinned memory is released while a graph uses it");
        }
    }
    d.pinned.erase(block);
    std::free(data);
    return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* handle) {
    FAKE_ENTER();
    Driver& d = driver();
    const void* pinned = kind == kDeviceToHost ? to : kind == kHostToDevice ? from : nullptr;
    {
        std::lock_guard<std::mutex> lock(d.mutex);
        const int expected = (kind == kDeviceToHost ? 1 : 0) + (kind == kHostToDevice ? 2 : 0);
        const int given = (d.is_pinned(to, bytes) ? 1 : 0) + (d.is_pinned(from, bytes) ? 2 : 0);
        if (given != expected || !bytes) return result(kInvalidValue);
    }
    return result(d.enqueue(d.find(handle), {[=] { std::memcpy(to, from, bytes); }, pinned}));
}

int cudaLaunchHostFunc(void* handle, HostFunction function, void* argument) {
    FAKE_ENTER();
    Driver& d = driver();
    return result(d.enqueue(d.find(handle), {[&d, function, argument] {
                                std::unique_lock<std::mutex> alone(d.host_functions, std::defer_lock);
                                if (d.serialize_host_functions) alone.lock();
                                call_host_function(function, argument);
                            }}));
}

int fake_is_captured(void* handle) {
    Stream* stream = driver().find(handle);
    std::lock_guard<std::mutex> lock(driver().mutex);
    return stream->captured != nullptr;
}

int cudaEventCreate(void** event) {
    FAKE_ENTER();
    *event = new Event;
    return kSuccess;
}

int cudaEventCreateWithFlags(void** event, unsigned flags) {
    FAKE_ENTER();
    if (flags != 2) return result(kInvalidValue);
    *event = new Event;
    return kSuccess;
}

int cudaEventDestroy(void* event) {
    FAKE_ENTER();
    delete static_cast<Event*>(event);
    return kSuccess;
}

int cudaEventRecord(void* handle, void* on) {
    FAKE_ENTER();
    auto* event = static_cast<Event*>(handle);
    Stream* stream = driver().find(on);
    {
        std::lock_guard<std::mutex> lock(driver().mutex);
        event->capture_id = stream->captured ? stream->capture_id : 0;
        event->order = stream->order;
        if (stream->captured) return kSuccess;
    }
    const uint64_t n = ++event->count->expected;
    return result(driver().enqueue(stream, {[count = event->count, n] { count->reach(n); }}));
}

int cudaStreamWaitEvent(void* on, void* handle, unsigned) {
    FAKE_ENTER();
    auto* event = static_cast<Event*>(handle);
    Stream* stream = driver().find(on);
    {
        std::lock_guard<std::mutex> lock(driver().mutex);
        if (event->capture_id) return result(driver().join(stream, *event));
        if (stream->captured) return result(kCaptureIsolation);
    }
    const uint64_t n = event->count->expected;
    return result(driver().enqueue(stream, {[count = event->count, n] { count->wait(n); }}));
}

}  // extern "C"
