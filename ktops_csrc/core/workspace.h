#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Scratch memory for one call of an op. Constructors take their arrays from it, in two passes of the same code: first
// from a workspace that only counts, then from one of the counted size.
//
//   Workspace counting;
//   Forward(problem, counting);
//   Workspace workspace(counting.bytes());
//   Forward(problem, workspace).run();
//
// Blocks are kept for later calls, because fresh memory costs a page fault every few KiB. Idle blocks are returned to
// the system, oldest first, as soon as all blocks together exceed both of these peaks of concurrent calls:
// * that of the last kWindow calls or more, so that one unusual call does not hold its memory for good;
// * that since the last empty_workspaces(), counted up to kKept bytes.
class Workspace {
public:
    // Only counts: arrays are null.
    Workspace() = default;
    // Throws std::runtime_error if no kept block is large enough and the system has no memory for a new one.
    explicit Workspace(size_t bytes);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // Returns count elements of T, aligned to a cache line.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
    }

    // Bytes taken so far.
    size_t bytes() const { return used_; }

    // More calls than a training step makes between two backward passes: models have at most about 100 layers of
    // experts, and preference training runs up to four forward passes before a backward.
    static constexpr size_t kWindow = 512;
    // More than 2048 tokens need in the largest models (252 MiB with LoRA at hidden_size 7168), so that calls of usual
    // sizes do not fault again, however rare the largest ones are.
    static constexpr size_t kKept = size_t{256} << 20;

private:
    static constexpr size_t kGap = 64;  // bytes after every array, which the address sanitizer guards

    void* take_bytes(size_t bytes);

    char* block_ = nullptr;
    size_t block_bytes_ = 0, size_ = 0, used_ = 0;  // of the whole block; requested; taken
};

// The blocks of the process: bytes in use by calls, bytes kept for later calls, and the most bytes in use at once since
// the last empty_workspaces(); the number of blocks; the number of blocks obtained from the system so far.
struct WorkspaceStats {
    size_t in_use, idle, peak, blocks, allocations;
};
WorkspaceStats workspace_stats();

// Returns all idle blocks to the system.
void empty_workspaces();

}  // namespace kt
