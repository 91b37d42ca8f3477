#pragma once

// kt::moe_fwd and the forward half of kt::moe_sft. The phases, with w the routing weight and R the number of positions:
//
//   project_x      xa = x A1^T                                      [R, r1]
//   code_x         x as codes, if gate_up takes codes               [T, H]
//   gate_up        [g|u] = x Wgu^T + s1 xa B1^T + bgu;  h = gate(g, u)                 [R, I]; saves [g|u] if requested
//   project_h      ha = h A2^T                                      [R, r2]
//   code_h         h as codes, if down takes codes                  [R, I]
//   down           w (h Wd^T + s2 ha B2^T + bd), kept as one row per position           [R, H]
//   sum            output = the sum of a token's rows                                  [T, H]
//
// If the kept rows are many, down and sum take portions of the experts in turn. Without reduce, down writes each
// position's own row, with w = 1, and "clear" the rows of routes without an expert.

#include <cstring>

#include "moe/combine-inl.h"

namespace kt::KT_ISA {

// w (h Wd^T + s2 ha B2^T + bd)
template <class T>
struct DownProduct {
    const Layer<T>& layer;
    const T *h, *ha;
    const CodedRows& coded_h;  // [R, I], if down takes codes

    void multiply(const Thread<T>& thread, BlockGemm<T>& block, int64_t expert, int64_t position, int64_t count,
                  const Columns& columns, const NextRows& after) const {
        const int64_t rank = layer.p.down_rank;
        if (coded_h.codes) {
            multiply_codes(block, thread.gemm, layer.down, expert, coded_h, nullptr, position, count, columns, after);
        } else {
            block.multiply_nt({h + position * layer.I, layer.I}, layer.I, layer.down, expert, columns);
        }
        if (rank) block.multiply_nt({ha + position * rank, rank}, rank, layer.B2, expert, columns);
    }
    // The columns of a task are a multiple of this.
    int64_t step() const { return kPanelColumns; }

    // Computes rows [0, rows) of an expert in bands, if that is best, and returns true. Calls put as RowBands does.
    template <class Put>
    bool multiply_parts(const Thread<T>& thread, int64_t expert, int64_t position, int64_t rows, const Columns& columns,
                        const NextRows& after, Put put) const {
        if constexpr (kHasBands<T>) {
            const int64_t rank = layer.p.down_rank;
            if (coded_h.codes || !layer.takes_bands(layer.down, expert, layer.I, columns, rank)) return false;
            const AddedProduct<T, StridedWeight<T>> added{{ha + position * rank, rank}, rank, &layer.B2};
            RowBands bands(thread.gemm, Rows<T>{h + position * layer.I, layer.I}, rows, layer.I, layer.down, expert,
                           added, after);
            const auto band = [&](int64_t j) {
                return Columns{columns.first + j, smaller(kBandRows, columns.count - j)};
            };
            bands.multiply(columns.count, kBandRows, band, put);
            return true;
        }
        return false;
    }
    void start(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n) const {
        load_bias(layer.p.down_bias, expert, column, n, thread.bias);
        for (int64_t j = n; j < round_up(n, kPanelColumns); ++j) thread.bias[j] = 0;
    }
    Vec<Acc<T>> value(const Thread<T>& thread, int64_t position, Vec<Acc<T>> c, int64_t j) const {
        return layer.route_weights[position] * (c + load(thread.bias + j));
    }
};

template <class T>
class Forward {
    using A = Acc<T>;
    using CombineDown = Combine<T, DownProduct<T>>;

public:
    static void run(const Problem& p, const ForwardResults& results) {
        const Routing routing(p);
        Workspace counting;
        Forward(p, routing, results, counting);
        Workspace workspace(counting.bytes());
        Forward(p, routing, results, workspace).run();
    }

private:
    Forward(const Problem& p, const Routing& routing, const ForwardResults& results, Workspace& workspace)
        : layer_(p, routing, workspace),
          p_(p),
          routing_(routing),
          results_(results),
          kept_(workspace, p, routing, p.reduce) {
        const int64_t R = routing_.num_routes;
        h_ = workspace.take<T>(R * layer_.I);
        xa_ = results.saved_xa ? static_cast<T*>(results.saved_xa) : workspace.take<T>(R * p_.gate_up_rank);
        ha_ = results.saved_ha ? static_cast<T*>(results.saved_ha) : workspace.take<T>(R * p_.down_rank);
        coded_h_ = take_coded(workspace, p_, layer_.down, R);
        threads_ = Thread<T>::take(workspace, p_, routing_);
    }

    void run() {
        const int64_t active = routing_.num_active;
        const Slabs slabs(layer_.gate_up_slab(), layer_.I, active, p_.num_threads, !layer_.gate_up.transposed);
        const DownProduct<T> product{layer_, h_, ha_, coded_h_};
        const auto code_x = [&](int64_t token, int) { layer_.code_token(token); };
        const auto code_h = [&](int64_t position, int) { code_row(h_, layer_.I, coded_h_, position); };
        const auto project_x = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<true>(threads_[thread].gemm, layer_, e, layer_.by_token(p_.hidden_states, first), layer_.H,
                                   layer_.A1, p_.gate_up_rank, xa_ + first * p_.gate_up_rank);
        };
        const auto gate_up = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, slabs.count);
            const int64_t column = at.slab * slabs.width;
            activate(threads_[thread], at.expert, column, smaller(slabs.width, layer_.I - column),
                     rows_of_next(p_, routing_, task, slabs, layer_.halves.at(1)));
        };
        const auto project_h = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<true>(threads_[thread].gemm, layer_, e, Rows<T>{h_ + first * layer_.I, layer_.I}, layer_.I,
                                   layer_.A2, p_.down_rank, ha_ + first * p_.down_rank);
        };
        const auto clear = [&](int64_t token, int) { clear_routes(token); };

        Schedule schedule;
        if (p_.gate_up_rank) schedule.add("project_x", active, project_x);
        if (layer_.coded_x.codes) schedule.add("code_x", p_.num_tokens, code_x);
        schedule.add("gate_up", active * slabs.count, gate_up, slabs.homes);
        if (p_.down_rank) schedule.add("project_h", active, project_h);
        if (coded_h_.codes) schedule.add("code_h", routing_.num_routes, code_h);
        kept_.for_each_portion([&](const Portion& portion) {
            const CombineDown combine(layer_, threads_, product, kept_, portion, static_cast<T*>(results_.output),
                                      coded_h_.codes ? kCodeSlab<T> : layer_.down_slab(), !layer_.down.transposed,
                                      p_.reduce);
            const auto down = [&](int64_t task, int thread) { combine.run(task, thread); };
            const auto sum = [&](int64_t token, int) { combine.sum(token); };
            Schedule other;
            Schedule& phases = portion.is_first ? schedule : other;
            phases.add("down", combine.num_tasks(), down, combine.homes());
            phases.add("sum", combine.num_sums(), sum);
            if (!p_.reduce && routing_.num_routes < p_.num_tokens * p_.top_k) phases.add("clear", p_.num_tokens, clear);
            phases.run<Region>(p_.num_threads, p_.launch);
        });
    }

    // h = gate(g, u), and [g | u] for backward
    void activate(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n, const NextRows& after) {
        const GateUp& halves = layer_.halves;
        const auto put = [&](int64_t position, int64_t rows, int64_t j, int64_t m, const A* c, int64_t ldc,
                             int64_t apart) {
            T* h = h_ + position * layer_.I + column + j;
            T* saved = static_cast<T*>(results_.saved_gate_up);
            if (saved) saved += position * halves.width() + halves.at(column + j);
            with_activation(p_, [&](auto activation) {
                for (int64_t i = 0; i < rows; ++i) {
                    for_each_vector<A>(m, [&](int64_t v, int64_t count) {
                        Vec<A> g, u;
                        halves.load(c + i * ldc, apart, v, count, g, u);
                        store_n(h + i * layer_.I + v, activation.template gate<A>(g, u).h, count);
                        if (saved) halves.store(saved + i * halves.width(), layer_.I, v, count, g, u);
                    });
                }
            });
        };
        gate_up_product(thread, layer_, expert, column, n, xa_, after, put);
    }

    void clear_routes(int64_t token) const {
        for (int64_t slot = 0; slot < p_.top_k; ++slot) {
            const int64_t id = p_.id(token, slot);
            if (id >= 0 && id < p_.num_experts) continue;
            T* row = static_cast<T*>(results_.output) + (token * p_.top_k + slot) * layer_.H;
            std::memset(static_cast<void*>(row), 0, static_cast<size_t>(layer_.H) * sizeof(T));
        }
    }

    const Layer<T> layer_;
    const Problem& p_;
    const Routing& routing_;
    const ForwardResults& results_;
    T *h_, *xa_, *ha_;
    const KeptRows<A> kept_;
    CodedRows coded_h_;
    const Thread<T>* threads_;
};

}  // namespace kt::KT_ISA
