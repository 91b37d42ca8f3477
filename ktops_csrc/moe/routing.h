#pragma once

#include <cstdint>
#include <memory>

#include "moe/problem.h"

namespace kt {

// Routes (t * K + j) sorted by expert, then by route: each gets a position. Ids outside [0, E) are left out.
struct Routing {
    int64_t num_routes;        // at most T * K
    int64_t most_rows;         // of any expert
    int64_t num_active;        // experts with at least one route
    const int32_t* active;     // their ids, ascending
    const int64_t* offsets;    // [E + 1]: expert e owns positions [offsets[e], offsets[e + 1])
    const int32_t* route;      // [num_routes]: the route at a position
    const int32_t* token;      // [num_routes]: its token, route / K
    const int32_t* positions;  // [T, K]: the positions of a token's routes, ascending, then -1

    int64_t rows(int64_t e) const { return offsets[e + 1] - offsets[e]; }

    explicit Routing(const Problem& problem);

private:
    std::unique_ptr<int64_t[]> memory_;
};

}  // namespace kt
