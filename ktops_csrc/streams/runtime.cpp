#include "streams/runtime.h"

#include <dlfcn.h>

#include <stdexcept>

namespace kt::streams {
namespace {

// Values of CUDA's enumerations.
constexpr int kHostToDevice = 1, kDeviceToHost = 2;
constexpr int kCaptureNone = 0, kCaptureActive = 1;
constexpr int kCaptureModeRelaxed = 2;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostAllocPortable = 1;
constexpr unsigned kUserObjectNoDestructorSync = 1;
constexpr unsigned kGraphUserObjectMove = 1;
constexpr int kFirstVersionWithEdges = 13000;

void* open(const std::string& path) {
    if (!path.empty()) {
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!library) throw std::runtime_error("kt: could not load the CUDA runtime: " + std::string(dlerror()));
        return library;
    }
    for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}) {
        if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return library;
    }
    return RTLD_DEFAULT;  // a program may have linked it statically
}

template <class Function>
void require(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("kt: no CUDA runtime in this process has ") + name);
}

}  // namespace

Runtime::Runtime(const std::string& path) {
    void* library = open(path);
    require(library, "cudaGetDevice", cuda_.GetDevice);
    require(library, "cudaSetDevice", cuda_.SetDevice);
    require(library, "cudaDeviceSynchronize", cuda_.DeviceSynchronize);
    require(library, "cudaMemcpyAsync", cuda_.MemcpyAsync);
    require(library, "cudaLaunchHostFunc", cuda_.LaunchHostFunc);
    require(library, "cudaEventCreateWithFlags", cuda_.EventCreateWithFlags);
    require(library, "cudaEventDestroy", cuda_.EventDestroy);
    require(library, "cudaEventRecord", cuda_.EventRecord);
    require(library, "cudaStreamWaitEvent", cuda_.StreamWaitEvent);
    require(library, "cudaHostAlloc", cuda_.HostAlloc);
    require(library, "cudaFreeHost", cuda_.FreeHost);
    require(library, "cudaThreadExchangeStreamCaptureMode", cuda_.ThreadExchangeStreamCaptureMode);
    require(library, "cudaUserObjectCreate", cuda_.UserObjectCreate);
    require(library, "cudaUserObjectRelease", cuda_.UserObjectRelease);
    require(library, "cudaGraphRetainUserObject", cuda_.GraphRetainUserObject);
    require(library, "cudaRuntimeGetVersion", cuda_.RuntimeGetVersion);
    require(library, "cudaGetLastError", cuda_.GetLastError);
    require(library, "cudaGetErrorString", cuda_.GetErrorString);
    int version = 0;
    check("cudaRuntimeGetVersion", cuda_.RuntimeGetVersion(&version));
    if (version >= kFirstVersionWithEdges) {
        require(library, "cudaStreamGetCaptureInfo", capture_info_with_edges_);
    } else {
        require(library, "cudaStreamGetCaptureInfo_v2", capture_info_);
    }
}

void Runtime::check(const char* function, int status) const {
    if (!status) return;
    cuda_.GetLastError();  // or else PyTorch's next call would report the error once more
    throw std::runtime_error(std::string("kt: ") + function + " failed: " + cuda_.GetErrorString(status));
}

int Runtime::current_device() const {
    int device = 0;
    check("cudaGetDevice", cuda_.GetDevice(&device));
    return device;
}

Capture Runtime::capture(Stream stream) const {
    int status = kCaptureNone;
    unsigned long long id = 0;
    Graph graph = nullptr;
    check("cudaStreamGetCaptureInfo",
          capture_info_with_edges_ ? capture_info_with_edges_(stream, &status, &id, &graph, nullptr, nullptr, nullptr)
                                   : capture_info_(stream, &status, &id, &graph, nullptr, nullptr));
    if (status == kCaptureNone) return {};
    if (status != kCaptureActive) {
        throw std::runtime_error("kt: the stream is part of a capture that an earlier error has invalidated");
    }
    return {id, graph};
}

void Runtime::copy_to_host(void* host, const void* device, size_t bytes, Stream stream) const {
    if (bytes) check("cudaMemcpyAsync", cuda_.MemcpyAsync(host, device, bytes, kDeviceToHost, stream));
}

void Runtime::copy_to_device(void* device, const void* host, size_t bytes, Stream stream) const {
    if (bytes) check("cudaMemcpyAsync", cuda_.MemcpyAsync(device, host, bytes, kHostToDevice, stream));
}

void Runtime::call_in_order(Stream stream, HostFunction function, void* argument) const {
    check("cudaLaunchHostFunc", cuda_.LaunchHostFunc(stream, function, argument));
}

Event Runtime::create_event() const {
    Event event = nullptr;
    check("cudaEventCreateWithFlags", cuda_.EventCreateWithFlags(&event, kEventDisableTiming));
    return event;
}

void Runtime::destroy(Event event) const { check("cudaEventDestroy", cuda_.EventDestroy(event)); }

void Runtime::record(Event event, Stream stream) const { check("cudaEventRecord", cuda_.EventRecord(event, stream)); }

void Runtime::wait(Stream stream, Event event) const {
    check("cudaStreamWaitEvent", cuda_.StreamWaitEvent(stream, event, 0));
}

void Runtime::keep_with_graph(Graph graph, void* object, HostFunction destroy) const {
    void* owner = nullptr;
    int status = cuda_.UserObjectCreate(&owner, object, destroy, 1, kUserObjectNoDestructorSync);
    if (status) destroy(object);
    check("cudaUserObjectCreate", status);
    status = cuda_.GraphRetainUserObject(graph, owner, 1, kGraphUserObjectMove);
    if (status) cuda_.UserObjectRelease(owner, 1);
    check("cudaGraphRetainUserObject", status);
}

void* Runtime::allocate(size_t bytes) const {
    int mode = kCaptureModeRelaxed;  // or else an allocation would invalidate captures
    check("cudaThreadExchangeStreamCaptureMode", cuda_.ThreadExchangeStreamCaptureMode(&mode));
    void* pinned = nullptr;
    const int status = cuda_.HostAlloc(&pinned, bytes, kHostAllocPortable);
    cuda_.ThreadExchangeStreamCaptureMode(&mode);
    check("cudaHostAlloc", status);
    return pinned;
}

void Runtime::release(void* pinned) const {
    int mode = kCaptureModeRelaxed;
    check("cudaThreadExchangeStreamCaptureMode", cuda_.ThreadExchangeStreamCaptureMode(&mode));
    const int status = cuda_.FreeHost(pinned);
    cuda_.ThreadExchangeStreamCaptureMode(&mode);
    check("cudaFreeHost", status);
}

void Runtime::synchronize(int device) const {
    const int before = current_device();
    if (device != before) check("cudaSetDevice", cuda_.SetDevice(device));
    const int status = cuda_.DeviceSynchronize();
    if (device != before) cuda_.SetDevice(before);
    check("cudaDeviceSynchronize", status);
}

}  // namespace kt::streams
