#pragma once

// Pinned memory for copies to and from a device.

#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "streams/runtime.h"

namespace kt::streams {

// Where work is enqueued. Stream 0 is another stream on every device.
struct Place {
    int device = 0;
    Stream stream = nullptr;
    Capture capture;  // of the stream at that time

    bool captured() const { return capture.graph != nullptr; }
};

// What comes before another use of memory: nothing, all that its stream was given, or what led to its event.
enum class After { kNothing, kStream, kEvent };

// Pinned memory of a device.
struct Memory {
    int device = 0;
    size_t bytes = 0;
    char* data = nullptr;
    Event event = nullptr;

    After after = After::kNothing;  // the block's while lent, like the next one
    Stream stream = nullptr;

    bool lent = false;
    int holders = 0;       // a block, or all those of a capture
    uint64_t capture = 0;  // of the holders
    uint64_t turn = 0;     // orders returns
};

class Staging;

// Memory lent to one call.
class Block {
public:
    Block() = default;
    Block(Staging* staging, Memory* memory, const Place& place) : staging_(staging), memory_(memory), place_(place) {}
    Block(Block&& other) noexcept { *this = static_cast<Block&&>(other); }
    Block& operator=(Block&& other) noexcept;
    ~Block();

    char* data() const { return memory_->data; }
    const Place& place() const { return place_; }

    // Call it before work that uses the block is enqueued, which waits for the work of earlier calls.
    void begin();
    // Call it when all of that work is enqueued. In a capture, the graph keeps the memory until the block is destroyed.
    void give_back();
    // Instead of give_back: all of that work will be over when the block is destroyed.
    void over_when_destroyed() { memory_->after = After::kNothing; }

private:
    Staging* staging_ = nullptr;
    Memory* memory_ = nullptr;
    Place place_;
    bool lent_ = true;
};

// The pinned memory of the process. Memory that was given back is used again at once: on the same stream, where earlier
// work comes first, or on another one of the device, which waits for the event of its return. A graph may be launched
// at any time, so memory that it uses serves only calls of its own capture while one of its blocks is there.
class Staging {
public:
    explicit Staging(const Runtime& runtime) : runtime_(runtime) {}

    // Returns a block of at least `bytes`, aligned to a page. The device must be the current one.
    Block take(const Place& place, size_t bytes);

    // Waits for the devices that were used.
    void synchronize();
    // Releases all memory that no block holds, after the work that uses it.
    void release();
    // Bytes of all memory.
    size_t bytes() const;

private:
    friend class Block;
    Memory* pick(const Place& place, size_t bytes) const;
    std::unique_ptr<Memory> allocate(int device, size_t bytes) const;
    Block lend(Memory& memory, const Place& place);
    void give_back(Memory& memory);
    void leave(Memory& memory, bool lent);

    const Runtime& runtime_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Memory>> memory_;
    std::set<int> devices_;
    uint64_t turns_ = 0;
    size_t bytes_ = 0;
};

}  // namespace kt::streams
