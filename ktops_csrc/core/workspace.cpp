#include "core/workspace.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace kt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = 2 << 20;

struct Block {
    char* data;
    size_t bytes;
    bool used;
};

// Large blocks come from mmap: free() would keep some of them for itself. Huge pages, where the system grants them,
// take fewer faults.
char* allocate(size_t bytes) {
    if (bytes < kHugePage) return static_cast<char*>(std::aligned_alloc(kPage, bytes));
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    madvise(data, bytes, MADV_HUGEPAGE);
    return static_cast<char*>(data);
}

void release(const Block& block) {
    if (block.bytes < kHugePage) {
        std::free(block.data);
    } else {
        munmap(block.data, block.bytes);
    }
}

class Pool {
public:
    // A used block of at least `bytes`.
    Block take(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        Block* best = nullptr;
        for (Block& block : blocks_) {
            if (!block.used && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
        }
        if (!best) best = add((bytes + kPage - 1) / kPage * kPage);
        best->used = true;
        idle_ -= best->bytes;
        in_use_ += best->bytes;
        peak_ = in_use_ > peak_ ? in_use_ : peak_;
        return *best;
    }

    void give_back(const char* data) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto block = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) { return b.data == data; });
        block->used = false;
        in_use_ -= block->bytes;
        idle_ += block->bytes;
        std::rotate(block, block + 1, blocks_.end());  // to the end: the youngest
    }

    void empty() {
        std::lock_guard<std::mutex> lock(mutex_);
        shrink(0);
        peak_ = in_use_;
    }

    WorkspaceStats stats() {
        std::lock_guard<std::mutex> lock(mutex_);
        return {in_use_, idle_, peak_, blocks_.size(), allocations_};
    }

    // Around fork(): the child has the memory, but not the threads that used it.
    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }
    void unlock_in_child() {
        for (Block& block : blocks_) block.used = false;
        idle_ += in_use_;
        in_use_ = 0;
        mutex_.unlock();
    }

private:
    // A new idle block, in place of idle ones if there would be too many.
    Block* add(size_t bytes) {
        const size_t limit = in_use_ + bytes > peak_ ? in_use_ + bytes : peak_;
        shrink(limit - in_use_ - bytes);
        blocks_.reserve(blocks_.size() + 1);
        char* data = allocate(bytes);
        if (!data) {
            throw std::runtime_error("kt: out of memory: no " + std::to_string(bytes >> 20) +
                                     " MiB for intermediate results; fewer tokens a call need less");
        }
        blocks_.push_back({data, bytes, false});
        idle_ += bytes;
        ++allocations_;
        return &blocks_.back();
    }

    // Releases the oldest idle blocks until the idle ones hold at most `bytes`.
    void shrink(size_t bytes) {
        for (size_t i = 0; i < blocks_.size() && idle_ > bytes;) {
            if (blocks_[i].used) {
                ++i;
                continue;
            }
            release(blocks_[i]);
            idle_ -= blocks_[i].bytes;
            blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }

    std::mutex mutex_;
    std::vector<Block> blocks_;  // oldest use first
    size_t in_use_ = 0, idle_ = 0, peak_ = 0, allocations_ = 0;
};

// Never destroyed: threads may outlive static objects.
Pool& pool() {
    static Pool* const instance = [] {
        pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock_in_child(); });
        return new Pool;
    }();
    return *instance;
}

}  // namespace

Workspace::Workspace(size_t bytes) {
    const Block block = pool().take(bytes);
    block_ = block.data;
    capacity_ = block.bytes;
    ASAN_POISON_MEMORY_REGION(block_, capacity_);
}

Workspace::~Workspace() {
    ASAN_UNPOISON_MEMORY_REGION(block_, capacity_);
    pool().give_back(block_);
}

void* Workspace::take_bytes(size_t bytes) {
    if (used_ + bytes > capacity_) throw std::logic_error("kt: workspace too small");
    void* p = block_ + used_;
    used_ += bytes;
    ASAN_UNPOISON_MEMORY_REGION(p, bytes - kGap);
    return p;
}

WorkspaceStats workspace_stats() { return pool().stats(); }

void empty_workspaces() { pool().empty(); }

}  // namespace kt
