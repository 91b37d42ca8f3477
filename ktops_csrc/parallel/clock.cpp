#include <chrono>

#include "parallel/profile.h"

namespace kt::profile {

int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace kt::profile
