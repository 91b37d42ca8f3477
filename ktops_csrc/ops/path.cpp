#include <algorithm>
#include <atomic>
#include <iterator>

#include "ops/moe_arguments.h"

namespace kt::ops {
namespace {

constexpr int kNone = kNumPaths;
std::atomic<int> forced{kNone};

}  // namespace

std::optional<Path> forced_path() {
    const int path = forced.load(std::memory_order_relaxed);
    return path == kNone ? std::nullopt : std::optional(static_cast<Path>(path));
}

std::string paths() {
    std::string names;
    for (const char* name : kPathNames) names += (names.empty() ? "" : ",") + std::string(name);
    return names;
}

std::string force_path(std::string name) {
    const auto* path = std::find(std::begin(kPathNames), std::end(kPathNames), name);
    Checker("kt::force_path")
        .require(name.empty() || path != std::end(kPathNames), "name must be one of ", paths(), " or empty, got '",
                 name, "'");
    const int before = forced.exchange(name.empty() ? kNone : static_cast<int>(path - kPathNames));
    return before == kNone ? "" : kPathNames[before];
}

}  // namespace kt::ops
