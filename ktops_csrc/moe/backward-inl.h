#pragma once

// The backward half of kt::moe_sft. The phases, with d = grad_output[token], w the routing weight and R the number of
// positions (without reduce, d = grad_output[token, slot] and w = 1):
//
//   clear_idle         zeros in the gradients of experts without tokens
//   code_x, recompute  [g|u] as in forward, if not saved                [R, 2I]
//   project_d          db2 = s2 d B2                                    [R, r2]
//   activate           dh = d Wd + db2 A2;  grad_w = <h, dh>;  dg, du = w dh times the derivatives of h
//                      grad_A2 = (w db2)^T h;  grad_Wd = (w d)^T h;  grad_bgu = the sum of [dg|du]
//                                                                       a slab of I at a time, h recomputed
//   project_grad       dgub = s1 [dg|du] B1                             [R, r1]
//   combine_x, sum_x   grad_x = the sum of [dg|du] Wgu + dgub A1        [T, H], as down and sum in forward
//   weights_h          grad_A1 = dgub^T x;  grad_Wgu = [dg|du]^T x;  grad_B2 = s2 (w d)^T ha;  grad_bd = the sum of w d
//   weights_i          grad_B1 = s1 [dg|du]^T xa
//   grad_topk_weights  grad_w + <d, bd>, the slabs of I added up        [T, K]

#include "isa/zero_past_caches-inl.h"
#include "moe/combine-inl.h"

namespace kt::KT_ISA {

// [dg|du] Wgu + dgub A1
template <class T>
struct GradProduct {
    const Layer<T>& layer;
    const T *grad_gate_up, *dgub;

    void multiply(const Thread<T>&, BlockGemm<T>& block, int64_t expert, int64_t position, int64_t,
                  const Columns& columns, const NextRows&) const {
        const int64_t rank = layer.p.gate_up_rank, k = layer.halves.width();
        block.multiply_nn({grad_gate_up + position * k, k}, k, layer.gate_up, expert, columns);
        if (rank) block.multiply_nn({dgub + position * rank, rank}, rank, layer.A1, expert, columns);
    }
    int64_t step() const { return layer.ahead_step(layer.gate_up, layer.halves.width(), layer.H, kPanelColumns); }

    template <class Put>
    bool multiply_parts(const Thread<T>& thread, int64_t expert, int64_t position, int64_t rows, const Columns& columns,
                        const NextRows& after, Put put) const {
        const int64_t rank = layer.p.gate_up_rank, k = layer.halves.width();
        return multiply_ahead(thread.gemm, layer, layer.gate_up, expert, {grad_gate_up + position * k, k}, rows, k,
                              layer.H, columns, after,
                              [&](BlockGemm<T>& block, int64_t i, int64_t m, const Columns& part) {
                                  const Rows<T> low{dgub + (position + i) * rank, rank};
                                  if (rank) block.multiply_nn(low, rank, layer.A1, expert, part);
                                  put(i, m, part.first - columns.first, part, block.row(0), part.count);
                              });
    }
    void start(const Thread<T>&, int64_t, int64_t, int64_t) const {}
    Vec<Acc<T>> value(const Thread<T>&, int64_t, Vec<Acc<T>> c, int64_t) const { return c; }
};

template <class T>
class Backward {
    using A = Acc<T>;
    using CombineX = Combine<T, GradProduct<T>>;

public:
    static void run(const BackwardProblem& b) {
        const Routing routing(b.forward);
        Workspace counting;
        Backward(b, routing, counting);
        Workspace workspace(counting.bytes());
        Backward(b, routing, workspace).run();
    }

private:
    Backward(const BackwardProblem& b, const Routing& routing, Workspace& workspace)
        : b_(b),
          layer_(b.forward, routing, workspace),
          p_(b.forward),
          routing_(routing),
          I_(layer_.I),
          H_(layer_.H),
          W_(layer_.halves.width()),
          kept_(workspace, p_, routing, static_cast<bool>(b.grad_hidden_states)),
          slab_(layer_.backward_slab(layer_.down, kAheadSlab, H_, I_)) {
        const int64_t R = routing_.num_routes;
        gate_up_ = static_cast<const T*>(b.saved_gate_up);
        grad_gate_up_ = workspace.take<T>(R * W_);
        if (!gate_up_) gate_up_ = recomputed_ = grad_gate_up_;  // activate() overwrites [g | u] with [dg | du]
        dgub_ = workspace.take<T>(R * p_.gate_up_rank);
        db2_ = workspace.take<T>(R * p_.down_rank);
        dot_slabs_ = ceil_div(I_, kDotSlab);  // fixed, because it decides the order in which grad_w is summed
        grad_w_ = workspace.take<A>(R * dot_slabs_);
        threads_ = Thread<T>::take(workspace, p_, routing_, slab_);
    }

    void run() {
        const int64_t active = routing_.num_active, E = p_.num_experts;
        const Slabs wide(slab_, I_, active, p_.num_threads, layer_.down.transposed,
                         layer_.ahead_step(layer_.down, H_, I_, kDotSlab));
        const Slabs again(layer_.gate_up_slab(), I_, active, p_.num_threads, !layer_.gate_up.transposed);
        const int64_t slabs_h = ceil_div(H_, kMaxColumns), slabs_i = ceil_div(W_, kMaxColumns);

        const auto code_x = [&](int64_t token, int) { layer_.code_token(token); };
        const auto recompute_slab = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, again.count);
            const int64_t column = at.slab * again.width;
            recompute(threads_[thread], at.expert, column, smaller(again.width, I_ - column),
                      rows_of_next(p_, routing_, task, again, layer_.halves.at(1)));
        };
        const auto project_d = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<false>(threads_[thread].gemm, layer_, e, layer_.like_output(b_.grad_output, first), H_,
                                    layer_.B2, p_.down_rank, db2_ + first * p_.down_rank);
        };
        const auto activate_slab = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, wide.count);
            const int64_t column = at.slab * wide.width;
            activate(threads_[thread], at.expert, column, smaller(wide.width, I_ - column),
                     rows_of_next(p_, routing_, task, wide));
        };
        const auto project_grad = [&](int64_t task, int thread) {
            const int64_t e = routing_.active[task], first = routing_.offsets[e];
            low_rank_product<false>(threads_[thread].gemm, layer_, e, grad_gate_up(first), W_, layer_.B1,
                                    p_.gate_up_rank, dgub_ + first * p_.gate_up_rank);
        };
        const auto weight_columns_h = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, slabs_h);
            weight_gradients_h(threads_[thread], at.expert, at.slab * kMaxColumns);
        };
        const auto weight_columns_i = [&](int64_t task, int thread) {
            const ExpertTask at(routing_, task, slabs_i);
            weight_gradients_i(threads_[thread], at.expert, at.slab * kMaxColumns);
        };
        const auto clear_idle = [&](int64_t expert, int) { clear_gradients(expert); };
        const auto routing_weights = [&](int64_t task, int) { finish_grad_w(task * kMaxRows); };

        const bool wants_b2_product = p_.down_rank && (wants_grad_h() || b_.grad_down_lora_A);
        const bool wants_b1_product = p_.gate_up_rank && (b_.grad_hidden_states || b_.grad_gate_up_lora_A);
        Schedule schedule;
        if (active < E) schedule.add("clear_idle", E, clear_idle);
        if (recomputed_) {
            schedule.add("code_x", layer_.coded_x.codes ? p_.num_tokens : 0, code_x);
            schedule.add("recompute", active * again.count, recompute_slab, again.homes);
        }
        if (wants_b2_product) schedule.add("project_d", active, project_d);
        if (wants_grad_h()) schedule.add("activate", active * wide.count, activate_slab, wide.homes);
        if (wants_b1_product) schedule.add("project_grad", active, project_grad);
        const auto run_with_others = [&](Schedule& phases) {
            if (b_.grad_gate_up_lora_A || b_.grad_gate_up_proj || b_.grad_down_lora_B || b_.grad_down_bias) {
                phases.add("weights_h", active * slabs_h, weight_columns_h);
            }
            if (b_.grad_gate_up_lora_B) phases.add("weights_i", active * slabs_i, weight_columns_i);
            if (b_.grad_topk_weights) {
                for (int64_t t = 0; t < p_.num_tokens; ++t) {
                    for (int64_t j = 0; j < p_.top_k; ++j) b_.grad_topk_weights.put(0, t, j, 0);
                }
                if (p_.reduce)
                    phases.add("grad_topk_weights", ceil_div(routing_.num_routes, kMaxRows), routing_weights);
            }
            phases.run<Region>(p_.num_threads, p_.launch);
        };
        b_.grad_hidden_states ? combine_x(schedule, run_with_others) : run_with_others(schedule);
    }

    // Adds the phases of grad_x to `first`; runs it, and then a schedule for every other portion of the experts, the
    // last one by run_with_others(schedule).
    template <class Run>
    void combine_x(Schedule& first, Run run_with_others) {
        const GradProduct<T> product{layer_, grad_gate_up_, dgub_};
        const int64_t slab = layer_.backward_slab(layer_.gate_up, kWideColumns, W_, H_);
        kept_.for_each_portion([&](const Portion& portion) {
            const CombineX combine(layer_, threads_, product, kept_, portion,
                                   static_cast<T*>(b_.grad_hidden_states.data), slab, layer_.gate_up.transposed);
            const auto rows = [&](int64_t task, int thread) { combine.run(task, thread); };
            const auto sum = [&](int64_t token, int) { combine.sum(token); };
            Schedule other;
            Schedule& phases = portion.is_first ? first : other;
            phases.add("combine_x", combine.num_tasks(), rows, combine.homes());
            phases.add("sum_x", combine.num_sums(), sum);
            if (portion.is_last) return run_with_others(phases);
            phases.run<Region>(p_.num_threads, p_.launch);
        });
    }

    bool wants_grad_h() const {
        return b_.grad_hidden_states || b_.grad_topk_weights || b_.grad_gate_up_proj || b_.grad_gate_up_bias ||
               b_.grad_gate_up_lora_A || b_.grad_gate_up_lora_B || b_.grad_down_lora_A || b_.grad_down_proj;
    }

    // Zeroes the gradients of an expert without tokens.
    void clear_gradients(int64_t expert) const {
        if (routing_.rows(expert)) return;
        for (const Result* result :
             {&b_.grad_gate_up_proj, &b_.grad_down_proj, &b_.grad_gate_up_bias, &b_.grad_down_bias,
              &b_.grad_gate_up_lora_A, &b_.grad_gate_up_lora_B, &b_.grad_down_lora_A, &b_.grad_down_lora_B}) {
            if (!*result) continue;
            const int64_t bytes = result->bytes() / p_.num_experts;
            zero_past_caches(static_cast<char*>(result->data) + expert * bytes, bytes);
        }
    }

    Rows<T> grad_gate_up(int64_t position) const { return {grad_gate_up_ + position * W_, W_}; }

    void recompute(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n, const NextRows& after) {
        const T* xa = static_cast<const T*>(b_.saved_xa);
        const auto put = [&](int64_t position, int64_t rows, int64_t j, int64_t m, const A* c, int64_t ldc,
                             int64_t apart) {
            const GateUp& halves = layer_.halves;
            T* to = recomputed_ + position * W_ + halves.at(column + j);
            for (int64_t i = 0; i < rows; ++i, c += ldc, to += W_) {
                for_each_vector<A>(m, [&](int64_t v, int64_t count) {
                    Vec<A> g, u;
                    halves.load(c, apart, v, count, g, u);
                    halves.store(to, I_, v, count, g, u);
                });
            }
        };
        gate_up_product(thread, layer_, expert, column, n, xa, after, put);
    }

    // column: a multiple of kDotSlab
    void activate(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n, const NextRows& after) {
        const int64_t begin = routing_.offsets[expert], rows = routing_.rows(expert), rank = p_.down_rank;
        const Columns columns{column, n};
        A sums[2 * kWideColumns];  // of [dg | du]
        for (int64_t j = 0; j < 2 * columns.padded(); ++j) sums[j] = 0;
        const Rows<T> d = layer_.like_output(b_.grad_output, begin);
        const auto put = [&](BlockGemm<T>& block, int64_t row, int64_t count, const Columns& part) {
            if (rank) block.multiply_nn({db2_ + (begin + row) * rank, rank}, rank, layer_.A2, expert, part);
            activation_gradients(block, begin + row, count, part,
                                 thread.activations + row * slab_ + part.first - column,
                                 sums + layer_.halves.at(part.first - column), columns.padded());
        };
        if (!multiply_ahead(thread.gemm, layer_, layer_.down, expert, d, rows, H_, I_, columns, after, put)) {
            const auto block_of_rows = [&](int64_t row, int64_t count) {
                BlockGemm<T> block(thread.gemm, count, columns.padded());
                block.multiply_nn(d.from(row), H_, layer_.down, expert, columns);
                put(block, row, count, columns);
            };
            for_each_row_block(rows, block_of_rows, most_rows_of_block(columns.padded()));
        }
        if (b_.grad_gate_up_bias) {
            const Columns both = layer_.halves.columns(column, n);
            for_each_range(both, sums, [&](int64_t first, const A* sum) {
                put_row(b_.grad_gate_up_bias, 0, expert, first, both.count, sum, A{1});
            });
        }
        const Operand<T> h{{thread.activations, slab_}, 0, n};
        const A* weights = layer_.route_weights + begin;
        if (b_.grad_down_lora_A) {
            const Operand<T> db2{{db2_ + begin * rank, rank}, 0, rank, weights};
            outer_product(thread.gemm, rows, db2, h, PutRows<A>{b_.grad_down_lora_A, expert, column, n});
        }
        if (b_.grad_down_proj) {
            const Operand<T> left{d, 0, H_, weights};
            weight_gradient(thread.gemm, rows, left, h, b_.grad_down_proj, expert, column);
        }
    }

    // Rows of dh, `part` of its columns: computes [dg | du], h for the weight gradients, and the parts of <h, dh>.
    void activation_gradients(BlockGemm<T>& block, int64_t first, int64_t count, const Columns& part, T* h, A* sums,
                              int64_t apart) {
        with_activation(p_, [&](auto activation) {
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t j = 0; j < part.count; j += kDotSlab) {
                    grad_w_[(part.first + j) / kDotSlab * routing_.num_routes + first + i] =
                        activation_gradient(activation, first + i, part.first + j, smaller(kDotSlab, part.count - j),
                                            block.row(i) + j, h + i * slab_ + j, sums + layer_.halves.at(j), apart);
                }
            }
        });
    }

    // One row of a slab: computes [dg | du] from dh, and h for the weight gradients. Returns its part of <h, dh>.
    template <class Activation>
    A activation_gradient(Activation activation, int64_t position, int64_t column, int64_t n, const A* dh, T* h,
                          A* sums, int64_t apart) {
        const GateUp& halves = layer_.halves;
        const int64_t offset = position * W_ + halves.at(column);
        const T* gate_up = gate_up_ + offset;
        T* grad = grad_gate_up_ + offset;
        const A w = layer_.route_weights[position];
        Vec<A> dot{};
        for_each_vector<A>(n, [&](int64_t j, int64_t count) {
            Vec<A> g, u, sum_g, sum_u;
            halves.load(gate_up, I_, j, count, g, u);
            const Gate<A> gate = activation.template gate<A>(g, u);
            const Vec<A> dhj = load_n(dh + j, count), wdh = w * dhj, dg = wdh * gate.dg, du = wdh * gate.du;
            dot += gate.h * dhj;
            store_n(h + j, gate.h, count);
            halves.store(grad, I_, j, count, dg, du);
            halves.load(sums, apart, j, count, sum_g, sum_u);
            halves.store(sums, apart, j, count, sum_g + dg, sum_u + du);
        });
        return sum_lanes<A>(dot);
    }

    // The gradients whose rows or columns run along H; each reads x or d once.
    void weight_gradients_h(const Thread<T>& thread, int64_t expert, int64_t column) {
        const int64_t begin = routing_.offsets[expert], rows = routing_.rows(expert);
        const int64_t n = smaller(kMaxColumns, H_ - column), r1 = p_.gate_up_rank, r2 = p_.down_rank;
        const Operand<T> x{layer_.by_token(p_.hidden_states, begin), column, n};
        const Operand<T> d{layer_.like_output(b_.grad_output, begin), column, n};
        const A* weights = layer_.route_weights + begin;
        if (b_.grad_gate_up_lora_A) {
            const Operand<T> dgub{{dgub_ + begin * r1, r1}, 0, r1};
            outer_product(thread.gemm, rows, dgub, x, PutRows<A>{b_.grad_gate_up_lora_A, expert, column, n});
        }
        if (b_.grad_gate_up_proj) {
            const Operand<T> grad{grad_gate_up(begin), 0, W_};
            weight_gradient(thread.gemm, rows, grad, x, b_.grad_gate_up_proj, expert, column);
        }
        if (b_.grad_down_lora_B) {
            const Operand<T> ha{{static_cast<const T*>(b_.saved_ha) + begin * r2, r2}, 0, r2, weights};
            outer_product(thread.gemm, rows, ha, d,
                          PutColumns<A>{b_.grad_down_lora_B, expert, column, n, static_cast<A>(p_.down_scaling)});
        }
        if (b_.grad_down_bias) {
            A sum[kMaxColumns] = {};
            for (int64_t i = 0; i < rows; ++i) {
                const T* row = d.rows.row(i) + column;
                for_each_vector<A>(n, [&](int64_t j, int64_t count) {
                    store(sum + j, load(sum + j) + weights[i] * load_n(row + j, count));
                });
            }
            put_row(b_.grad_down_bias, 0, expert, column, n, sum, A{1});
        }
    }

    void weight_gradients_i(const Thread<T>& thread, int64_t expert, int64_t column) {
        const int64_t begin = routing_.offsets[expert], n = smaller(kMaxColumns, W_ - column), r1 = p_.gate_up_rank;
        const Operand<T> xa{{static_cast<const T*>(b_.saved_xa) + begin * r1, r1}, 0, r1};
        const Operand<T> grad{grad_gate_up(begin), column, n};
        outer_product(thread.gemm, routing_.rows(expert), xa, grad,
                      PutColumns<A>{b_.grad_gate_up_lora_B, expert, column, n, static_cast<A>(p_.gate_up_scaling)});
    }

    // grad_w = <h, dh> + <d, bd>, the slabs added in order
    void finish_grad_w(int64_t first) {
        for (int64_t i = first; i < smaller(first + kMaxRows, routing_.num_routes); ++i) {
            A sum = 0;
            for (int64_t slab = 0; slab < dot_slabs_; ++slab) sum += grad_w_[slab * routing_.num_routes + i];
            const int64_t token = routing_.token[i], slot = routing_.route[i] % p_.top_k;
            if (p_.down_bias) sum += bias_product(token, p_.id(token, slot));
            b_.grad_topk_weights.put(0, token, slot, sum);
        }
    }

    A bias_product(int64_t token, int64_t expert) const {
        const T* d = static_cast<const T*>(b_.grad_output) + token * H_;
        A sum = 0;
        for (int64_t j = 0; j < H_; ++j)
            sum += static_cast<A>(to_float(read(d + j))) * static_cast<A>(p_.down_bias.at(expert, j));
        return sum;
    }

    const BackwardProblem& b_;
    const Layer<T> layer_;
    const Problem& p_;
    const Routing& routing_;
    int64_t I_, H_, W_;  // W: columns of [g | u]
    const KeptRows<A> kept_;
    int64_t slab_, dot_slabs_;  // columns of a task of dh
    const T* gate_up_;
    T* recomputed_ = nullptr;
    T *grad_gate_up_, *dgub_, *db2_;
    A* grad_w_;  // [slabs, R]
    const Thread<T>* threads_;
};

}  // namespace kt::KT_ISA
