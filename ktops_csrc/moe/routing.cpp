#include "moe/routing.h"

namespace kt {

size_t Routing::workspace_bytes(const Problem& p) {
    return 2 * Workspace::padded<int32_t>(p.num_tokens * p.top_k) + Workspace::padded<int32_t>(p.num_experts) +
           2 * Workspace::padded<int64_t>(p.num_experts + 1);
}

Routing::Routing(const Problem& p, Workspace& workspace) {
    const int64_t E = p.num_experts;
    auto* offsets = workspace.take<int64_t>(E + 1);
    auto* cursor = workspace.take<int64_t>(E + 1);
    auto* active = workspace.take<int32_t>(E);
    auto* route = workspace.take<int32_t>(p.num_tokens * p.top_k);
    auto* token = workspace.take<int32_t>(p.num_tokens * p.top_k);

    for (int64_t e = 0; e <= E; ++e) offsets[e] = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) {
        for (int64_t j = 0; j < p.top_k; ++j) {
            const int64_t e = p.id(t, j);
            if (e >= 0 && e < E) ++offsets[e + 1];
        }
    }
    num_active = 0;
    most_rows = 0;
    for (int64_t e = 0; e < E; ++e) {
        if (offsets[e + 1]) active[num_active++] = static_cast<int32_t>(e);
        most_rows = larger(most_rows, offsets[e + 1]);
        offsets[e + 1] += offsets[e];
        cursor[e] = offsets[e];
    }
    for (int64_t t = 0; t < p.num_tokens; ++t) {
        for (int64_t j = 0; j < p.top_k; ++j) {
            const int64_t e = p.id(t, j);
            if (e < 0 || e >= E) continue;
            route[cursor[e]] = static_cast<int32_t>(t * p.top_k + j);
            token[cursor[e]++] = static_cast<int32_t>(t);
        }
    }
    num_routes = offsets[E];
    this->offsets = offsets;
    this->active = active;
    this->route = route;
    this->token = token;
}

}  // namespace kt
