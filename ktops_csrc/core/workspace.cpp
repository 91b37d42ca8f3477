#include "core/workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

struct Block {
    char* data;
    size_t bytes;
};

std::mutex mutex;
std::vector<Block> idle;

// Two for each of two callers at once: routes and scratch.
constexpr size_t kMaxIdleBlocks = 4;

}  // namespace

Workspace::Workspace(size_t bytes) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        auto best = idle.end();
        for (auto block = idle.begin(); block != idle.end(); ++block) {
            if (block->bytes >= bytes && (best == idle.end() || block->bytes < best->bytes)) best = block;
        }
        if (best != idle.end()) {
            block_ = best->data;
            capacity_ = best->bytes;
            idle.erase(best);
            return;
        }
    }
    capacity_ = (bytes + 4095) / 4096 * 4096 + 4096;
    block_ = static_cast<char*>(std::aligned_alloc(4096, capacity_));
    if (!block_) throw std::bad_alloc();
}

Workspace::~Workspace() {
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back({block_, capacity_});
    if (idle.size() > kMaxIdleBlocks) {  // drop the oldest: sizes follow the latest calls
        std::free(idle.front().data);
        idle.erase(idle.begin());
    }
}

void* Workspace::take_bytes(size_t bytes) {
    if (used_ + bytes > capacity_) throw std::logic_error("kt: workspace too small");
    void* p = block_ + used_;
    used_ += bytes;
    return p;
}

}  // namespace kt
