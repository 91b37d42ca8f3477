#include "moe/routing.h"

namespace kt {

Routing::Routing(const Problem& p) {
    const int64_t E = p.num_experts, R = p.num_tokens * p.top_k;
    memory_.reset(new int64_t[2 * (E + 1) + ceil_div(E + 3 * R + p.num_tokens, 2)]);
    int64_t* offsets = memory_.get();
    int64_t* cursor = offsets + E + 1;
    auto* active = reinterpret_cast<int32_t*>(cursor + E + 1);
    int32_t* route = active + E;
    int32_t* token = route + R;
    int32_t* positions = token + R;
    int32_t* taken = positions + R;

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
    for (int64_t i = 0; i < R; ++i) positions[i] = -1;
    for (int64_t t = 0; t < p.num_tokens; ++t) taken[t] = 0;
    for (int64_t i = 0; i < num_routes; ++i)
        positions[token[i] * p.top_k + taken[token[i]]++] = static_cast<int32_t>(i);
    this->offsets = offsets;
    this->active = active;
    this->route = route;
    this->token = token;
    this->positions = positions;
}

}  // namespace kt
