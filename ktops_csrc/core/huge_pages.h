#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace kt {

constexpr size_t kHugePage = 2 << 20;

// Asks the system for the huge pages that lie within this memory, one page fault each instead of 512. It grants them at
// first use, or not at all.
inline void ask_for_huge_pages(void* data, size_t bytes) {
    const auto from = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage,
                    end = (from + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace kt
