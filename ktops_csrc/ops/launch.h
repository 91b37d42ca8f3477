#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "core/views.h"

namespace kt::ops {

// Runs on PyTorch's threads, so torch.set_num_threads applies.
inline void launch(int64_t n, void (*body)(void* context), void* context) {
    if (n <= 1) return body(context);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(context);
    });
}

// Returns how many of PyTorch's threads `work` is worth, if waking one up is worth `work_a_thread`.
inline int useful_threads(int64_t work, int64_t work_a_thread) {
    const auto available = static_cast<int64_t>(torch::stable::get_num_threads());
    return static_cast<int>(larger(1, smaller(available, work / work_a_thread)));
}

}  // namespace kt::ops
