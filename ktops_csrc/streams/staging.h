#pragma once

// Pinned memory for copies to and from a device.

#include <map>
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
    bool operator<(const Place& other) const {
        return device != other.device ? device < other.device : stream < other.stream;
    }
};

class Staging;

// A block lent to one call.
class Block {
public:
    Block() = default;
    Block(Staging* staging, const Place& place, char* data, size_t bytes)
        : staging_(staging), place_(place), data_(data), bytes_(bytes) {}
    Block(Block&& other) noexcept { *this = static_cast<Block&&>(other); }
    Block& operator=(Block&& other) noexcept;
    ~Block() { give_back(); }

    char* data() const { return data_; }
    const Place& place() const { return place_; }
    // Call it when nothing that is enqueued after this moment uses the block.
    void give_back();

private:
    Staging* staging_ = nullptr;
    Place place_;
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

// The blocks of the process. One that was given back is reused on its own stream at once, because work that still uses
// it comes first there. Blocks of captured calls belong to no stream: a graph may be launched on any.
class Staging {
public:
    explicit Staging(const Runtime& runtime) : runtime_(runtime) {}

    // Returns a block of at least `bytes`, aligned to a page.
    Block take(const Place& place, size_t bytes);

    // Waits for the devices that were used.
    void synchronize();
    // Releases all blocks that are not lent, after the work that uses them.
    void release();
    // Bytes of all blocks.
    size_t bytes() const;

private:
    friend class Block;
    struct Memory {
        char* data;
        size_t bytes;
    };
    void give_back(const Place& place, Memory memory);
    static Memory pick(std::vector<Memory>& from, size_t bytes);

    const Runtime& runtime_;
    mutable std::mutex mutex_;
    std::map<Place, std::vector<Memory>> of_streams_;
    std::vector<Memory> of_no_stream_;
    std::set<int> devices_;
    size_t bytes_ = 0;
};

}  // namespace kt::streams
