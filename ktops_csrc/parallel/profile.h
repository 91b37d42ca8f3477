#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace kt::profile {

// The number of blocks of C computed by each path. The caller of describe() supplies the names of the indices.
constexpr int kMaxPaths = 12;
using PathCounts = std::array<int64_t, kMaxPaths>;

// One step of an operator, summed over its calls. Times in nanoseconds. Every moment of a call belongs to one step,
// so the `wall` times of an operator's steps add up to its time.
struct Step {
    int64_t calls = 0;
    int64_t tasks = 0;
    int64_t busy = 0;  // in tasks, all threads together
    int64_t wait = 0;  // for the other threads' last tasks, all threads together
    int64_t wall = 0;
    PathCounts paths{};
    int64_t at_home = 0;  // tasks that a thread of their own node ran
    int64_t stolen = 0;   // tasks that a thread of another node ran
};

// Off at first, unless KTOPS_PROFILE=1. Returns the previous setting. Calls in progress keep the one they began with.
bool set_enabled(bool enabled);
bool enabled();

// Returns a line for each step so far, in the order of first appearance: "operator step calls tasks busy wait wall
// at_home stolen\n", with " path=blocks" before the newline for each path that was taken.
std::string describe(const char* const* path_names);

// The path counts of this thread's current step; null unless its call is profiled.
inline thread_local PathCounts* path_counts = nullptr;
inline void count_path(int path) {
    if (path_counts) ++(*path_counts)[static_cast<size_t>(path)];
}

// Returns the time in nanoseconds. In a separate file, clock.cpp, because test/profile.cpp supplies its own clock.
int64_t now();

// The profile of one call of an operator, from construction to destruction, on the calling thread.
class Call {
public:
    explicit Call(const char* op) {
        if (enabled()) begin(op);
    }
    ~Call() {
        if (op_) end();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // Returns this thread's current call, null if it is not profiled.
    static Call* current();

    // Attributes the time since the last mark to `step`, as busy or as waiting.
    void mark(const char* step, bool busy = true);
    // Adds a step that measured its threads itself; the next mark leaves out its `wall` time.
    void add(const char* step, const Step& values);

private:
    void begin(const char* op);
    void end();

    const char* op_ = nullptr;
    Call* outer_ = nullptr;
    int64_t last_ = 0;
    int64_t accounted_ = 0;
};

inline void mark(const char* step) {
    if (Call* call = Call::current()) call->mark(step);
}

}  // namespace kt::profile
