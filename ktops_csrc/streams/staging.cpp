#include "streams/staging.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace kt::streams {

namespace {

constexpr size_t kSmallest = 4096;

// From so many on, streams of a device wait for each other's memory. The CPU computes one call at a time: there is one
// for the call at hand, and others for those that are copied meanwhile.
constexpr int kMostBlocks = 4;

// A power of two, so that calls of all sizes on one stream leave at most twice the memory of the largest.
size_t rounded(size_t bytes) {
    size_t size = kSmallest;
    while (size < bytes) size *= 2;
    return size;
}

bool unused(const Memory& memory) { return memory.holders == 0 && memory.after == After::kNothing; }

}  // namespace

Block& Block::operator=(Block&& other) noexcept {
    std::swap(staging_, other.staging_);
    std::swap(memory_, other.memory_);
    std::swap(place_, other.place_);
    std::swap(lent_, other.lent_);
    return *this;
}

Block::~Block() {
    if (memory_) staging_->leave(*memory_, lent_);
}

void Block::begin() {
    if (memory_->after == After::kEvent && memory_->stream != place_.stream) {
        staging_->runtime_.wait(place_.stream, memory_->event);
    }
    memory_->after = After::kStream;
    memory_->stream = place_.stream;
}

void Block::give_back() {
    staging_->runtime_.record(memory_->event, place_.stream);
    memory_->after = After::kEvent;
    lent_ = false;
    staging_->give_back(*memory_);
    if (!place_.captured()) memory_ = nullptr;
}

Block Staging::take(const Place& place, size_t bytes) {
    bytes = rounded(bytes);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        devices_.insert(place.device);
        if (Memory* memory = pick(place, bytes)) return lend(*memory, place);
    }
    std::unique_ptr<Memory> memory = allocate(place.device, bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += bytes;
    memory_.push_back(std::move(memory));
    return lend(*memory_.back(), place);
}

// Prefers memory that needs no wait, then more memory up to kMostBlocks, then what was given back first. A capture
// waits instead of using more.
Memory* Staging::pick(const Place& place, size_t bytes) const {
    Memory *ready = nullptr, *first = nullptr, *other = nullptr;
    int count = 0;
    for (const auto& memory : memory_) {
        if (memory->device != place.device || memory->bytes < bytes) continue;
        const bool smaller_than_other = !other || memory->bytes < other->bytes;
        if (place.captured() && unused(*memory) && smaller_than_other) other = memory.get();
        if (memory->capture != place.capture.id) continue;
        ++count;
        if (memory->lent) continue;
        if (memory->after == After::kNothing || memory->stream == place.stream) {
            if (!ready || memory->bytes < ready->bytes) ready = memory.get();
        } else if (memory->after == After::kEvent && (!first || memory->turn < first->turn)) {
            first = memory.get();
        }
    }
    if (ready) return ready;
    if (place.captured()) return first ? first : other;
    return count < kMostBlocks ? nullptr : first;
}

std::unique_ptr<Memory> Staging::allocate(int device, size_t bytes) const {
    auto memory = std::make_unique<Memory>();
    memory->device = device;
    memory->bytes = bytes;
    memory->event = runtime_.create_event();
    try {
        memory->data = static_cast<char*>(runtime_.allocate(bytes));
    } catch (...) {
        runtime_.destroy(memory->event);
        throw;
    }
    return memory;
}

Block Staging::lend(Memory& memory, const Place& place) {
    memory.lent = true;
    memory.capture = place.capture.id;
    ++memory.holders;
    return {this, &memory, place};
}

void Staging::give_back(Memory& memory) {
    std::lock_guard<std::mutex> lock(mutex_);
    memory.lent = false;
    memory.turn = ++turns_;
    if (!memory.capture) --memory.holders;
}

void Staging::leave(Memory& memory, bool lent) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (lent) memory.lent = false;
    memory.turn = ++turns_;
    if (--memory.holders || !memory.capture) return;
    memory.capture = 0;  // the graph is gone
    memory.after = After::kNothing;
}

void Staging::synchronize() {
    std::set<int> devices;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        devices = devices_;
    }
    for (int device : devices) runtime_.synchronize(device);
}

void Staging::release() {
    std::vector<std::unique_ptr<Memory>> idle;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto held = [](const auto& memory) { return memory->holders > 0; };
        const auto begin = std::partition(memory_.begin(), memory_.end(), held);
        std::move(begin, memory_.end(), std::back_inserter(idle));
        memory_.erase(begin, memory_.end());
    }
    if (idle.empty()) return;
    synchronize();
    for (const auto& memory : idle) {
        runtime_.release(memory->data);
        runtime_.destroy(memory->event);
        std::lock_guard<std::mutex> lock(mutex_);
        bytes_ -= memory->bytes;
    }
}

size_t Staging::bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
}

}  // namespace kt::streams
