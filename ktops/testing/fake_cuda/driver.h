#pragma once

// The state of the fake driver.

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "stream.h"

namespace fake {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidDevice = 101, kCaptureUnsupported = 900,
              kCaptureInvalidated = 901, kCaptureUnjoined = 904, kCaptureIsolation = 905;
constexpr int kCaptureNone = 0, kCaptureActive = 1, kCaptureInvalid = 2;
constexpr int kModeGlobal = 0, kModeRelaxed = 2;
constexpr int kHostToDevice = 1, kDeviceToHost = 2;
constexpr int kDevices = 2;

using HostFunction = void (*)(void*);

struct UserObject {
    void* object;
    HostFunction destroy;
    unsigned references;
};

struct Event {
    std::shared_ptr<Counter> count = std::make_shared<Counter>();  // which enqueued work may need for longer
    unsigned long long capture_id = 0;                             // 0 if it was recorded outside of captures
    Order order;
};

// A graph, or one that can be launched.
struct Graph {
    std::vector<Operation> nodes;
    std::vector<const Stream*> captured_on;  // for each node
    std::vector<UserObject*> objects;
    std::shared_ptr<Counter> launches;  // of one that can be launched
};

inline thread_local int current_device = 0;
inline thread_local int thread_mode = kModeGlobal;

// Never destroyed: threads may outlive static objects.
struct Driver {
    Delays delays;
    std::mutex host_functions;
    bool serialize_host_functions = false;

    std::mutex mutex;  // guards what follows
    std::set<Stream*> streams;
    std::map<int, Stream*> default_streams;
    std::map<char*, size_t> pinned;
    std::set<Graph*> graphs;
    std::map<std::string, int> failures;
    std::map<std::string, int64_t> calls;
    unsigned long long captures = 0;
    Stream destructors{-1, delays};  // the thread that destroys objects of graphs

    Stream* add_stream(int device) {
        auto* stream = new Stream(device, delays);
        streams.insert(stream);
        return stream;
    }

    Stream* find(void* handle) {
        if (handle) return static_cast<Stream*>(handle);
        std::lock_guard<std::mutex> lock(mutex);
        Stream*& stream = default_streams[current_device];
        if (!stream) stream = add_stream(current_device);
        return stream;
    }

    const char* pinned_block(const void* data) {
        const auto after = pinned.upper_bound(static_cast<char*>(const_cast<void*>(data)));
        return after == pinned.begin() ? nullptr : std::prev(after)->first;
    }

    bool is_pinned(const void* data, size_t bytes) {
        const char* begin = static_cast<const char*>(data);
        for (const auto& [block, size] : pinned) {
            if (begin >= block && begin + bytes <= block + size) return true;
        }
        return false;
    }

    // Launches execute nodes one after the other, whatever their order.
    void check_order(const Graph& graph, Stream* stream, const Operation& operation) {
        if (!operation.pinned) return;
        for (size_t i = 0; i < graph.nodes.size(); ++i) {
            const void* other = graph.nodes[i].pinned;
            if (!other || pinned_block(other) != pinned_block(operation.pinned)) continue;
            if (stream->order[graph.captured_on[i]] <= i) misuse("a graph uses pinned memory without order");
        }
    }

    // Adds an operation to the stream, or to the graph that it is captured into.
    int enqueue(Stream* stream, Operation operation) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (stream->invalidated) return kCaptureInvalidated;
            if (Graph* graph = stream->captured) {
                check_order(*graph, stream, operation);
                graph->nodes.push_back(std::move(operation));
                graph->captured_on.push_back(stream);
                stream->order[stream] = graph->nodes.size();
                return kSuccess;
            }
        }
        stream->push(std::move(operation));
        return kSuccess;
    }

    // Orders what a stream captures next after an event of the same capture, which the stream becomes part of.
    int join(Stream* stream, const Event& event) {
        const auto same = [&](const Stream* other) { return other->captured && other->capture_id == event.capture_id; };
        const auto found = std::find_if(streams.begin(), streams.end(), same);
        if (found == streams.end() || (stream->captured && !same(stream))) return kCaptureIsolation;
        stream->captured = (*found)->captured;
        stream->capture_id = event.capture_id;
        stream->capture_mode = (*found)->capture_mode;
        for (const auto& [other, count] : event.order) stream->order[other] = std::max(stream->order[other], count);
        return kSuccess;
    }

    // Called by functions that captures forbid.
    int check_captures() {
        if (thread_mode == kModeRelaxed) return kSuccess;
        std::lock_guard<std::mutex> lock(mutex);
        int status = kSuccess;
        for (Stream* stream : streams) {
            if (!stream->captured || stream->capture_mode != kModeGlobal) continue;
            stream->invalidated = true;
            status = kCaptureUnsupported;
        }
        return status;
    }

    void release(const std::vector<UserObject*>& objects) {
        std::lock_guard<std::mutex> lock(mutex);
        for (UserObject* object : objects) {
            if (--object->references) continue;
            destructors.push({[object] {
                call_host_function(object->destroy, object->object);
                delete object;
            }});
        }
    }

    void destroy(Graph* graph) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (!graphs.erase(graph)) misuse("a graph is destroyed twice");
        }
        release(graph->objects);
        delete graph;
    }
};

Driver& driver();

inline thread_local int last_error = kSuccess;

inline int result(int status) {
    if (status) last_error = status;
    return status;
}

// Counts a call; returns the status of a failure that a test asked for.
int enter(const char* function);

#define FAKE_ENTER() \
    if (const int status = enter(__func__)) return status

}  // namespace fake
