#pragma once

// The CUDA runtime that PyTorch has loaded. Its functions are looked up by name, so the build needs no CUDA.

#include <cstddef>
#include <cstdint>
#include <string>

namespace kt::streams {

using Stream = void*;  // cudaStream_t
using Graph = void*;   // cudaGraph_t
using Event = void*;   // cudaEvent_t
using HostFunction = void (*)(void*);

// The capture that a stream is part of. id and graph are 0 if there is none.
struct Capture {
    uint64_t id = 0;
    Graph graph = nullptr;
};

// Functions throw std::runtime_error with the name of the CUDA function that failed and CUDA's reason.
class Runtime {
public:
    // path: a library with the functions of the CUDA runtime; "" for the one in this process. Throws if there is none.
    explicit Runtime(const std::string& path);

    int current_device() const;
    Capture capture(Stream stream) const;

    // In stream order. Host memory must be pinned. Copies of 0 bytes are left out.
    void copy_to_host(void* host, const void* device, size_t bytes, Stream stream) const;
    void copy_to_device(void* device, const void* host, size_t bytes, Stream stream) const;
    // `function` must call neither CUDA nor Python.
    void call_in_order(Stream stream, HostFunction function, void* argument) const;

    // An event of the current device, for order only. What a stream does after wait() comes after what another one was
    // given before record(), or, if both are captured, in their graph.
    Event create_event() const;
    void destroy(Event event) const;
    void record(Event event, Stream stream) const;
    void wait(Stream stream, Event event) const;

    // Has `destroy` called with the object, on a thread of CUDA, when the graph and all that was made from it are gone;
    // at once if this throws.
    void keep_with_graph(Graph graph, void* object, HostFunction destroy) const;

    // Pinned memory, also while a stream is captured.
    void* allocate(size_t bytes) const;
    void release(void* pinned) const;

    // Waits for all work of a device.
    void synchronize(int device) const;

private:
    void check(const char* function, int status) const;

    struct Functions {
        int (*GetDevice)(int*);
        int (*SetDevice)(int);
        int (*DeviceSynchronize)();
        int (*MemcpyAsync)(void*, const void*, size_t, int kind, Stream);
        int (*LaunchHostFunc)(Stream, HostFunction, void*);
        int (*EventCreateWithFlags)(Event*, unsigned flags);
        int (*EventDestroy)(Event);
        int (*EventRecord)(Event, Stream);
        int (*StreamWaitEvent)(Stream, Event, unsigned flags);
        int (*HostAlloc)(void**, size_t, unsigned flags);
        int (*FreeHost)(void*);
        int (*ThreadExchangeStreamCaptureMode)(int*);
        int (*UserObjectCreate)(void** object, void*, HostFunction destroy, unsigned references, unsigned flags);
        int (*UserObjectRelease)(void* object, unsigned references);
        int (*GraphRetainUserObject)(Graph, void* object, unsigned references, unsigned flags);
        int (*RuntimeGetVersion)(int*);
        int (*GetLastError)();
        const char* (*GetErrorString)(int);
    } cuda_{};
    // The one of this version of CUDA.
    int (*capture_info_)(Stream, int* status, unsigned long long* id, Graph*, const void** dependencies,
                         size_t*) = nullptr;
    int (*capture_info_with_edges_)(Stream, int* status, unsigned long long* id, Graph*, const void** dependencies,
                                    const void** edges, size_t*) = nullptr;
};

}  // namespace kt::streams
