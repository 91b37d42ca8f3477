#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Scratch memory for one call of an op. Constructors take their arrays from it, in two passes of the same code: with a
// workspace that only counts, and with one of the size that came out.
//
//   Workspace counting;
//   Forward(problem, counting);
//   Workspace workspace(counting.bytes());
//   Forward(problem, workspace).run();
//
// The block was kept from an earlier call where one is large enough, because fresh memory costs a page fault every few
// KiB. Idle blocks are given back to the system, oldest first, as soon as all blocks together exceed what calls in
// progress at once have needed
// * in the last kWindow calls or more: one unusual call does not hold its memory for good, and
// * since the last empty_workspaces(), up to kKept bytes.
class Workspace {
public:
    // Only counts: arrays are null.
    Workspace() = default;
    // Throws std::runtime_error if there is no such block and the system has no memory for one.
    explicit Workspace(size_t bytes);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // count elements of T, aligned to a cache line.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
    }

    // Taken so far.
    size_t bytes() const { return used_; }

    // More calls than a step of training makes between two backward passes: the models with the most layers of experts
    // have about 100, and preference training runs up to four forward passes before a backward.
    static constexpr size_t kWindow = 512;
    // More than 2048 tokens need in the largest models (140 MiB with LoRA at hidden_size 7168): usual sizes never fault
    // again, however seldom the largest of them comes.
    static constexpr size_t kKept = size_t{256} << 20;

private:
    static constexpr size_t kGap = 64;  // bytes after every array, which the address sanitizer guards

    void* take_bytes(size_t bytes);

    char* block_ = nullptr;
    size_t block_bytes_ = 0, size_ = 0, used_ = 0;  // of the block, which may be larger; asked for; taken
};

// The blocks of the process. Bytes of those that calls use now, of those kept for later calls, and the most that were
// in use at once since the last empty_workspaces(); blocks of both kinds; blocks obtained from the system so far.
struct WorkspaceStats {
    size_t in_use, idle, peak, blocks, allocations;
};
WorkspaceStats workspace_stats();

// Gives all idle blocks back to the system.
void empty_workspaces();

}  // namespace kt
