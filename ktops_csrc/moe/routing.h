#pragma once

#include <cstdint>
#include <memory>

#include "moe/problem.h"

namespace kt {

// The routes (t * K + j) in the order of the kernels: by expert, then by token. Ids outside [0, E) are left out.
struct Routing {
    int64_t num_routes;        // at most T * K
    int64_t most_rows;         // of any expert
    int64_t num_active;        // experts with at least one route
    const int32_t* active;     // their ids, ascending
    const int64_t* offsets;    // [E + 1]: expert e owns positions routes [offsets[e], offsets[e + 1])
    const int32_t* route;      // [num_routes]
    const int32_t* token;      // [num_routes]: route / K
    const int32_t* positions;  // [T, K]: where the routes of a token are in this order, ascending; then -1

    int64_t rows(int64_t e) const { return offsets[e + 1] - offsets[e]; }

    explicit Routing(const Problem& problem);

private:
    std::unique_ptr<int64_t[]> memory_;
};

}  // namespace kt
