#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Scratch memory for one call of an op, carved from a block that is kept for the next call: fresh memory costs a page
// fault every 4 KiB. At most one idle block is kept for each concurrent caller.
class Workspace {
public:
    explicit Workspace(size_t bytes);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // count elements of T, aligned to a cache line.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(take_bytes(padded<T>(count)));
    }

    // What take<T>(count) uses of the block.
    template <class T>
    static size_t padded(int64_t count) {
        return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    }

private:
    void* take_bytes(size_t bytes);

    char* block_;
    size_t capacity_;
    size_t used_ = 0;
};

}  // namespace kt
