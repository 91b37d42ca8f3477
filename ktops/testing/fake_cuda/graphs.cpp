// Capture and graphs. A graph is a list of operations in the order in which they were captured.

#include "driver.h"
#include "fake_cuda.h"

#ifndef FAKE_CUDA_VERSION
#define FAKE_CUDA_VERSION 13000
#endif

namespace fake {
namespace {

int capture_info(void* handle, int* status, unsigned long long* id, void** graph) {
    Stream* stream = driver().find(handle);
    std::lock_guard<std::mutex> lock(driver().mutex);
    *status = stream->invalidated ? kCaptureInvalid : stream->captured ? kCaptureActive : kCaptureNone;
    if (*status == kCaptureActive) {
        *id = stream->capture_id;
        *graph = stream->captured;
    }
    return kSuccess;
}

// Launches of a graph are executed one after the other, on whichever streams.
void launch(Graph* graph, Stream* stream) {
    const uint64_t n = ++graph->launches->expected;
    const auto launches = graph->launches;
    stream->push({[launches, n] { launches->wait(n - 1); }});
    for (const Operation& node : graph->nodes) stream->push(node);
    const std::vector<UserObject*> objects = graph->objects;
    for (UserObject* object : objects) ++object->references;
    stream->push({[launches, n, objects] {
        launches->reach(n);
        driver().release(objects);
    }});
}

}  // namespace
}  // namespace fake

using namespace fake;

extern "C" {

// The name, and the signature, depend on the version.
#if FAKE_CUDA_VERSION >= 13000
int cudaStreamGetCaptureInfo(void* stream, int* status, unsigned long long* id, void** graph, const void**,
                             const void**, size_t*) {
    FAKE_ENTER();
    return capture_info(stream, status, id, graph);
}
#else
int cudaStreamGetCaptureInfo(void*, int*, unsigned long long*) { misuse("cudaStreamGetCaptureInfo of CUDA 11"); }

int cudaStreamGetCaptureInfo_v2(void* stream, int* status, unsigned long long* id, void** graph, const void**,
                                size_t*) {
    FAKE_ENTER();
    return capture_info(stream, status, id, graph);
}
#endif

int cudaThreadExchangeStreamCaptureMode(int* mode) {
    FAKE_ENTER();
    std::swap(*mode, thread_mode);
    return kSuccess;
}

int cudaStreamBeginCapture(void* handle, int mode) {
    FAKE_ENTER();
    Stream* stream = driver().find(handle);
    std::lock_guard<std::mutex> lock(driver().mutex);
    if (!handle || stream->captured) return result(kInvalidValue);
    stream->captured = new Graph;
    stream->capture_id = ++driver().captures;
    stream->capture_mode = mode;
    return kSuccess;
}

int cudaStreamEndCapture(void* handle, void** graph) {
    FAKE_ENTER();
    Stream* stream = driver().find(handle);
    Graph* captured = nullptr;
    int status = kSuccess;
    {
        std::lock_guard<std::mutex> lock(driver().mutex);
        captured = stream->captured;
        if (!captured) return result(kInvalidValue);
        Order joined = stream->order;
        for (Stream* other : driver().streams) {
            if (other->captured != captured) continue;
            if (joined[other] < other->order[other]) status = kCaptureUnjoined;
            if (other->invalidated) status = kCaptureInvalidated;
            other->leave_capture();
        }
        driver().graphs.insert(captured);
    }
    *graph = status ? nullptr : captured;
    if (status) driver().destroy(captured);
    return result(status);
}

int cudaGraphInstantiate(void** exec, void* graph, uint64_t) {
    FAKE_ENTER();
    auto* copy = new Graph(*static_cast<Graph*>(graph));
    copy->launches = std::make_shared<Counter>();
    std::lock_guard<std::mutex> lock(driver().mutex);
    for (UserObject* object : copy->objects) ++object->references;
    driver().graphs.insert(copy);
    *exec = copy;
    return kSuccess;
}

int cudaGraphLaunch(void* exec, void* stream) {
    FAKE_ENTER();
    Stream* on = driver().find(stream);
    std::lock_guard<std::mutex> lock(driver().mutex);
    if (!driver().graphs.count(static_cast<Graph*>(exec))) misuse("a graph is launched after its destruction");
    launch(static_cast<Graph*>(exec), on);
    return kSuccess;
}

int cudaGraphDestroy(void* graph) {
    FAKE_ENTER();
    driver().destroy(static_cast<Graph*>(graph));
    return kSuccess;
}

int cudaGraphExecDestroy(void* exec) {
    FAKE_ENTER();
    driver().destroy(static_cast<Graph*>(exec));
    return kSuccess;
}

int cudaUserObjectCreate(void** object, void* data, HostFunction destroy, unsigned references, unsigned flags) {
    FAKE_ENTER();
    if (flags != 1) return result(kInvalidValue);
    *object = new UserObject{data, destroy, references};
    return kSuccess;
}

int cudaUserObjectRelease(void* object, unsigned references) {
    FAKE_ENTER();
    driver().release(std::vector<UserObject*>(references, static_cast<UserObject*>(object)));
    return kSuccess;
}

int cudaGraphRetainUserObject(void* graph, void* object, unsigned references, unsigned flags) {
    FAKE_ENTER();
    if (references != 1 || flags != 1) return result(kInvalidValue);
    std::lock_guard<std::mutex> lock(driver().mutex);
    static_cast<Graph*>(graph)->objects.push_back(static_cast<UserObject*>(object));
    return kSuccess;
}

}  // extern "C"
