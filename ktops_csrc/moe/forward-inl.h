#pragma once

// kt::moe_fwd and the forward half of kt::moe_sft.

#include "moe/layer-inl.h"

namespace kt::KT_ISA {

// sums += w (c + bias)
template <class T>
struct AddWeighted {
    const Layer<T>& layer;
    const Thread<T>& thread;

    void start(int64_t expert, int64_t column, int64_t n) const {
        load_bias(layer.p.down_bias, expert, column, n, thread.bias);
        for (int64_t j = n; j < kSlab; ++j) thread.bias[j] = 0;
    }
    void operator()(Acc<T>* sums, int64_t route, const Acc<T>* c, int64_t n) const {
        const Acc<T> w = layer.route_weights[route];
        for (int64_t j = 0; j < round_up(n, kPanelColumns); j += kLanes<Acc<T>>) {
            store(sums + j, load(sums + j) + w * (load(c + j) + load(thread.bias + j)));
        }
    }
};

template <class T>
class Forward {
public:
    static void run(const Problem& p, const ForwardResults& results) {
        const Routing routing(p);
        const int64_t R = routing.num_routes;
        Workspace workspace(Layer<T>::bytes(routing) + Workspace::padded<T>(R * p.intermediate_size) +
                            Workspace::padded<T>(R * p.gate_up_rank) + Workspace::padded<T>(R * p.down_rank) +
                            Thread<T>::bytes(p, routing));
        const Layer<T> layer(p, routing, workspace);
        Forward(layer, results, workspace).run();
    }

private:
    Forward(const Layer<T>& layer, const ForwardResults& results, Workspace& workspace)
        : layer_(layer), p_(layer.p), routing_(layer.routing), results_(results) {
        const int64_t R = routing_.num_routes;
        h_ = workspace.take<T>(R * layer.I);
        xa_ = results.saved_xa ? static_cast<T*>(results.saved_xa) : workspace.take<T>(R * p_.gate_up_rank);
        ha_ = results.saved_ha ? static_cast<T*>(results.saved_ha) : workspace.take<T>(R * p_.down_rank);
        threads_ = Thread<T>::take(workspace, p_, routing_);
    }

    void run() {
        const int64_t active = routing_.num_active;
        const int64_t i_slab = slab_width(layer_.I, active, p_.num_threads), i_slabs = ceil_div(layer_.I, i_slab);
        const int64_t blocks = ceil_div(p_.num_tokens, kTokenBlock);
        const int64_t h_slab = slab_width(layer_.H, blocks, p_.num_threads), h_slabs = ceil_div(layer_.H, h_slab);

        const auto project_x = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<true>(threads_[thread].gemm, layer_, e, layer_.by_token(p_.hidden_states, first), layer_.H,
                                   layer_.A1, p_.gate_up_rank, xa_ + first * p_.gate_up_rank);
        };
        const auto gate_up = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, i_slabs);
            const int64_t column = at.piece * i_slab;
            activate(threads_[thread], at.expert, column, smaller(i_slab, layer_.I - column));
        };
        const auto project_h = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<true>(threads_[thread].gemm, layer_, e, Rows<T>{h_ + first * layer_.I, layer_.I}, layer_.I,
                                   layer_.A2, p_.down_rank, ha_ + first * p_.down_rank);
        };
        const auto down = [&](int64_t task, int thread) {
            const int64_t column = task % h_slabs * h_slab;
            combine_down(threads_[thread], task / h_slabs * kTokenBlock, column, smaller(h_slab, layer_.H - column));
        };

        Schedule schedule;
        if (p_.gate_up_rank) schedule.add("project_x", active, project_x);
        schedule.add("gate_up", active * i_slabs, gate_up);
        if (p_.down_rank) schedule.add("project_h", active, project_h);
        schedule.add("down", blocks * h_slabs, down);
        schedule.run<KT_REGION>(p_.num_threads, p_.launch);
    }

    // h = act(g) u, and [g | u] for backward
    void activate(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n) {
        with_activation(p_.activation, [&](auto activation) {
            gate_up_product(thread, layer_, expert, column, n, xa_,
                            [&](int64_t route, const Acc<T>* g, const Acc<T>* u) {
                                T* h = h_ + route * layer_.I + column;
                                T* saved = static_cast<T*>(results_.saved_gate_up);
                                if (saved) saved += route * 2 * layer_.I + column;
                                for_each_vector<Acc<T>>(n, [&](int64_t j, int64_t count) {
                                    const Vec<Acc<T>> gj = load(g + j), uj = load(u + j);
                                    store_n(h + j, activation.template gate<Acc<T>>(gj).value * uj, count);
                                    if (!saved) return;
                                    store_n(saved + j, gj, count);
                                    store_n(saved + layer_.I + j, uj, count);
                                });
                            });
        });
    }

    // out = sum of w (h Wd^T + s2 ha B2^T + bd)
    void combine_down(const Thread<T>& thread, int64_t first_token, int64_t column, int64_t n) {
        const auto multiply = [&](BlockGemm<T>& block, int64_t expert, int64_t route, const Columns& columns) {
            block.multiply_nt({h_ + route * layer_.I, layer_.I}, layer_.I, layer_.down, expert, columns);
            if (p_.down_rank) {
                block.multiply_nt({ha_ + route * p_.down_rank, p_.down_rank}, p_.down_rank, layer_.B2, expert, columns);
            }
        };
        combine(thread, layer_, first_token, column, n, static_cast<T*>(results_.output), multiply,
                AddWeighted<T>{layer_, thread});
    }

    const Layer<T>& layer_;
    const Problem& p_;
    const Routing& routing_;
    const ForwardResults& results_;
    T *h_, *xa_, *ha_;
    const Thread<T>* threads_;
};

}  // namespace kt::KT_ISA
