#include "streams/staging.h"

#include <utility>

namespace kt::streams {

namespace {

constexpr size_t kSmallest = 4096;

// A power of two, so that calls of all sizes together leave at most twice the memory of the largest.
size_t rounded(size_t bytes) {
    size_t size = kSmallest;
    while (size < bytes) size *= 2;
    return size;
}

}  // namespace

Block& Block::operator=(Block&& other) noexcept {
    std::swap(staging_, other.staging_);
    std::swap(place_, other.place_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

void Block::give_back() {
    if (staging_) staging_->give_back(place_, {data_, bytes_});
    staging_ = nullptr;
}

Block Staging::take(const Place& place, size_t bytes) {
    bytes = rounded(bytes);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        devices_.insert(place.device);
        Memory memory{nullptr, 0};
        if (!place.captured()) memory = pick(of_streams_[place], bytes);
        if (!memory.data) memory = pick(of_no_stream_, bytes);
        if (memory.data) return {this, place, memory.data, memory.bytes};
    }
    char* data = static_cast<char*>(runtime_.allocate(bytes));
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += bytes;
    return {this, place, data, bytes};
}

Staging::Memory Staging::pick(std::vector<Memory>& from, size_t bytes) {
    auto best = from.end();
    for (auto it = from.begin(); it != from.end(); ++it) {
        if (it->bytes >= bytes && (best == from.end() || it->bytes < best->bytes)) best = it;
    }
    if (best == from.end()) return {nullptr, 0};
    const Memory memory = *best;
    from.erase(best);
    return memory;
}

void Staging::give_back(const Place& place, Memory memory) {
    std::lock_guard<std::mutex> lock(mutex_);
    (place.captured() ? of_no_stream_ : of_streams_[place]).push_back(memory);
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
    std::vector<Memory> unused;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        unused.swap(of_no_stream_);
        for (auto& [place, blocks] : of_streams_) unused.insert(unused.end(), blocks.begin(), blocks.end());
        of_streams_.clear();
    }
    if (unused.empty()) return;
    synchronize();
    for (const Memory& memory : unused) {
        runtime_.release(memory.data);
        std::lock_guard<std::mutex> lock(mutex_);
        bytes_ -= memory.bytes;
    }
}

size_t Staging::bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
}

}  // namespace kt::streams
