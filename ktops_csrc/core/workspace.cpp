#include "core/workspace.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/huge_pages.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace kt {
namespace {

constexpr size_t kPage = 4096;

struct Block {
    char* data;
    size_t bytes;
    size_t needed;  // by the call that uses it; 0 if idle
};

// Large blocks come from mmap: free() may keep memory instead of returning it to the system.
char* allocate(size_t bytes) {
    if (bytes < kHugePage) return static_cast<char*>(std::aligned_alloc(kPage, bytes));
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    ask_for_huge_pages(data, bytes);
    return static_cast<char*>(data);
}

void release(const Block& block) {
    if (block.bytes < kHugePage) {
        std::free(block.data);
    } else {
        munmap(block.data, block.bytes);
    }
}

// The bytes that concurrent calls need, and the peak over the last kWindow to 2 kWindow calls. The sizes of blocks do
// not tell what is still needed, since a call may get a larger block than it needs.
class Needed {
public:
    void add(size_t bytes) {
        if (++calls_ % Workspace::kWindow == 0) {
            previous_ = current_;
            current_ = now_;
        }
        now_ += bytes;
        current_ = std::max(current_, now_);
    }
    void remove(size_t bytes) { now_ -= bytes; }
    void forget() { previous_ = current_ = now_; }
    size_t recent_peak() const { return std::max(previous_, current_); }

private:
    size_t calls_ = 0, now_ = 0, current_ = 0, previous_ = 0;
};

class Pool {
public:
    // Returns a block of at least `bytes`, now in use.
    Block take(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        bytes = std::max((bytes + kPage - 1) / kPage * kPage, kPage);
        Block* best = nullptr;
        for (Block& block : blocks_) {
            if (!block.needed && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
        }
        if (!best) best = add(bytes);
        best->needed = bytes;
        needed_.add(bytes);
        idle_ -= best->bytes;
        in_use_ += best->bytes;
        peak_ = std::max(peak_, in_use_);
        return *best;
    }

    void give_back(const char* data) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto block = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) { return b.data == data; });
        needed_.remove(block->needed);
        block->needed = 0;
        in_use_ -= block->bytes;
        idle_ += block->bytes;
        std::rotate(block, block + 1, blocks_.end());  // to the end: the youngest
        shrink(room(in_use_));
    }

    void empty() {
        std::lock_guard<std::mutex> lock(mutex_);
        shrink(0);
        peak_ = in_use_;
        needed_.forget();
    }

    WorkspaceStats stats() {
        std::lock_guard<std::mutex> lock(mutex_);
        return {in_use_, idle_, peak_, blocks_.size(), allocations_};
    }

    // Around fork(): the child inherits the memory, but not the threads that used it.
    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }
    void unlock_in_child() {
        for (Block& block : blocks_) {
            needed_.remove(block.needed);
            block.needed = 0;
        }
        idle_ += in_use_;
        in_use_ = 0;
        mutex_.unlock();
    }

private:
    // Adds an idle block, and releases older idle ones if all together would be too large.
    Block* add(size_t bytes) {
        shrink(room(in_use_ + bytes));
        blocks_.reserve(blocks_.size() + 1);
        char* data = allocate(bytes);
        if (!data) {
            throw std::runtime_error("kt: out of memory: could not allocate " + std::to_string(bytes >> 20) +
                                     " MiB for intermediate results; pass fewer tokens per call");
        }
        blocks_.push_back({data, bytes, 0});
        idle_ += bytes;
        ++allocations_;
        return &blocks_.back();
    }

    // Bytes of idle blocks that may be kept while `used` bytes are in use.
    size_t room(size_t used) const {
        const size_t limit = std::max(needed_.recent_peak(), std::min(peak_, Workspace::kKept));
        return limit > used ? limit - used : 0;
    }

    // Releases the oldest idle blocks until the idle ones hold at most `bytes`.
    void shrink(size_t bytes) {
        for (size_t i = 0; i < blocks_.size() && idle_ > bytes;) {
            if (blocks_[i].needed) {
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
    Needed needed_;
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
    block_bytes_ = block.bytes;
    size_ = bytes;
    ASAN_POISON_MEMORY_REGION(block_, block_bytes_);
}

Workspace::~Workspace() {
    if (!block_) return;
    ASAN_UNPOISON_MEMORY_REGION(block_, block_bytes_);
    pool().give_back(block_);
}

void* Workspace::take_bytes(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    const size_t begin = used_;
    used_ += bytes + kGap;
    if (!block_) return nullptr;
    if (used_ > size_) throw std::logic_error("kt: workspace too small");
    ASAN_UNPOISON_MEMORY_REGION(block_ + begin, bytes);
    return block_ + begin;
}

WorkspaceStats workspace_stats() { return pool().stats(); }

void empty_workspaces() { pool().empty(); }

}  // namespace kt
