#pragma once

// What forward and backward share: the layer's operands in their types, and the three products they are built from.

#include <new>

#include "gemm/code_gemm-inl.h"
#include "gemm/outer_product-inl.h"
#include "moe/activation-inl.h"
#include "moe/routing.h"
#include "weights/weight-inl.h"

namespace kt::KT_ISA {

// What a thread sets up for its work. A type of the row's own: no other row is to share functions of it.
struct Region : Isa::Region {};

// Columns of one task of a product along the rows of a weight: of I twice, of g and of u. More where each task copies
// the rows of A for itself. Rows of one of its blocks: as many as fit.
template <class T>
constexpr int64_t kSlab = BlockGemm<T>::kCopiesRows ? 256 : 64;
template <class T>
constexpr int64_t kSlabRows = smaller(kMaxRows, kMaxRows* kMaxColumns / (2 * kSlab<T>));

// The same of products with codes, which read the codes of the next columns of a task ahead.
template <class T>
constexpr int64_t kCodeSlab = larger(kSlab<T>, 128);

// Columns of I over which <h, dh> is summed before the sums are added up.
constexpr int64_t kDotSlab = 64;

// Columns of one task of a product down the rows of a weight: as many as fit for the most rows of an expert, whole rows
// of the weight at best, since memory is slow a few lines at a time.
inline int64_t wide_slab(const Routing& routing) {
    int64_t columns = kWideColumns;
    while (columns > kMaxColumns && columns * round_up(routing.most_rows, kRowStep) > kMaxRows * kMaxColumns)
        columns /= 2;
    return columns;
}

// Tokens and columns of the sums that one task of Combine holds: 2 MiB of float32.
constexpr int64_t kTokenBlock = 2048;
constexpr int64_t kSumSlab = 256;

// Whether the rows of all routes, [R, H], are kept and added up in a phase of their own. Then tasks are (expert,
// columns), enough for any number of threads; else a task is a slab of columns over all experts and holds its sums.
constexpr int64_t kKeptBytes = 32 << 20;

inline bool keeps_rows(const Problem& p, const Routing& routing) {
    return routing.num_routes * p.hidden_size * static_cast<int64_t>(sizeof(float)) <= kKeptBytes;
}

// At most `width`, and less when there are not enough tasks for the threads: the results do not depend on it.
inline int64_t slab_width(int64_t width, int64_t columns, int64_t tasks_a_slab, int num_threads) {
    while (width > kPanelColumns && ceil_div(columns, width) * tasks_a_slab < 4 * num_threads) width /= 2;
    return width;
}

template <class T>
struct Thread {
    GemmScratch<T> gemm;
    Acc<T>* sums;    // [min(T, kTokenBlock), min(H, kSumSlab)] unless routes are kept
    T* activations;  // [most rows of an expert, wide_slab]
    Acc<T>* bias;    // [kWideColumns]

    Thread(Workspace& w, const Problem& p, const Routing& routing)
        : gemm(w, p.forced_path),
          sums(w.take<Acc<T>>(sum_elements(p, routing))),
          activations(w.take<T>(routing.most_rows * wide_slab(routing))),
          bias(w.take<Acc<T>>(kWideColumns)) {}

    static Thread* take(Workspace& w, const Problem& p, const Routing& routing) {
        auto* threads = w.take<Thread>(p.num_threads);
        for (int i = 0; i < p.num_threads; ++i) {
            const Thread thread(w, p, routing);
            if (threads) new (threads + i) Thread(thread);
        }
        return threads;
    }

private:
    static int64_t sum_elements(const Problem& p, const Routing& routing) {
        if (keeps_rows(p, routing)) return 0;
        return smaller(p.num_tokens, kTokenBlock) * smaller(round_up(p.hidden_size, kPanelColumns), kSumSlab);
    }
};

// The digits of activations in products with this weight, 0 if they are computed in floats.
template <class T>
inline int code_digits(const Problem& p, const WeightTensor& weight) {
    if (std::is_same_v<T, double> || weight.is_dense() || !format_of(weight).code_group) return 0;
    const IntegerProducts products{p.compute,
                                   p.inference,
                                   p.num_tokens * p.top_k,
                                   p.num_experts,
                                   weight.columns,
                                   code_group(weight),
                                   Weight<T>(weight).table().code_columns};
    return choose_digits(products, kIsaLimits<T>, p.forced_path);
}

// Of `rows` rows of activations, if products with this weight are computed in integers.
template <class T>
inline CodedRows take_coded(Workspace& workspace, const Problem& p, const Weight<T>& weight, int64_t rows) {
    const int digits = code_digits<T>(p, weight.tensor());
    return digits ? weight.take_codes(workspace, rows, digits) : CodedRows{};
}

// Row i of x, k elements, as row i of `rows`.
template <class T>
inline void code_row(const T* x, int64_t k, const CodedRows& rows, int64_t i) {
    if constexpr (std::is_same_v<Acc<T>, float>) {
        x += i * k;
        rows.digits > 1 ? quantize_digits(x, k, rows, i) : quantize_row(x, k, rows, i);
    }
}

template <class T>
struct Layer {
    const Problem& p;
    const Routing& routing;
    const Acc<T>* route_weights;  // [num_routes]
    Weight<T> gate_up, down;
    StridedWeight<T> A1, B1, A2, B2;  // the scalings are folded into B
    int64_t I, H;
    CodedRows coded_x;  // [T, H], if gate_up takes codes

    Layer(const Problem& problem, const Routing& routing, Workspace& workspace)
        : p(problem),
          routing(routing),
          gate_up{problem.gate_up_proj},
          down{problem.down_proj},
          A1{problem.gate_up_lora_A, 1},
          B1{problem.gate_up_lora_B, problem.gate_up_scaling},
          A2{problem.down_lora_A, 1},
          B2{problem.down_lora_B, problem.down_scaling},
          I(problem.intermediate_size),
          H(problem.hidden_size) {
        auto* weights = workspace.take<Acc<T>>(routing.num_routes);
        coded_x = take_coded(workspace, p, gate_up, p.num_tokens);
        route_weights = weights;
        if (!weights) return;
        for (int64_t i = 0; i < routing.num_routes; ++i) {
            weights[i] = static_cast<Acc<T>>(p.topk_weights.at(routing.token[i], routing.route[i] % p.top_k));
        }
    }

    // To be called for every token before gate_up_product, if there is coded_x.
    void code_token(int64_t token) const { code_row(static_cast<const T*>(p.hidden_states), H, coded_x, token); }

    // Rows of a [T, H] tensor for the routes from `first` on.
    Rows<T> by_token(const void* tensor, int64_t first) const {
        return {static_cast<const T*>(tensor), H, routing.token + first};
    }
};

// A loop over (expert, slab) tasks: active experts times `slabs`.
struct ExpertTask {
    int64_t expert, slab;
    ExpertTask(const Routing& routing, int64_t task, int64_t slabs)
        : expert(routing.active[task / slabs]), slab(task % slabs) {}
};

// The rows of W of the task that a thread takes after `task`, most likely: the others take those between. A slab is
// `width` rows.
inline NextRows rows_of_next(const Problem& p, const Routing& routing, int64_t task, int64_t slabs, int64_t width) {
    const int64_t next = task + p.num_threads;
    if (next >= routing.num_active * slabs) return {};
    const ExpertTask at(routing, next, slabs);
    return {at.expert, at.slab * width};
}

// out[row][0 .. rank) = a . A^T (transposed) or a . B, for all rows of one expert.
template <bool kTransposed, class T>
inline void low_rank_product(const GemmScratch<T>& scratch, const Layer<T>& layer, int64_t expert, const Rows<T>& a,
                             int64_t k, const StridedWeight<T>& factor, int64_t rank, T* out) {
    const int64_t rows = layer.routing.rows(expert);
    for (int64_t j = 0; j < rank; j += kMaxColumns) {
        const Columns columns{j, smaller(kMaxColumns, rank - j)};
        for_each_row_block(rows, [&](int64_t row, int64_t n) {
            BlockGemm<T> block(scratch, n, columns.padded());
            if constexpr (kTransposed) {
                block.multiply_nt(a.from(row), k, factor, expert, columns);
            } else {
                block.multiply_nn(a.from(row), k, factor, expert, columns);
            }
            for (int64_t i = 0; i < n; ++i) {
                T* to = out + (row + i) * rank + j;
                const Acc<T>* c = block.row(i);
                for_each_vector<Acc<T>>(columns.count,
                                        [&](int64_t v, int64_t count) { store_n(to + v, load(c + v), count); });
            }
        });
    }
}

// [g | u] = x Wgu^T + s1 xa B1^T + bgu for columns [column, column + n) of g and of u; epilogue(row, g, u) gets
// pointers to n accumulators of each. after: the thread's next task.
template <class T, class Epilogue>
inline void gate_up_product(const Thread<T>& thread, const Layer<T>& layer, int64_t expert, int64_t column, int64_t n,
                            const T* xa, const NextRows& after, Epilogue epilogue) {
    const Problem& p = layer.p;
    const Columns columns{column, n, layer.I + column};
    Acc<T>* bias_g = thread.bias;
    Acc<T>* bias_u = thread.bias + columns.padded();
    load_bias(p.gate_up_bias, expert, column, n, bias_g);
    load_bias(p.gate_up_bias, expert, layer.I + column, n, bias_u);
    const int64_t begin = layer.routing.offsets[expert];
    const auto block_of_rows = [&](int64_t row, int64_t count) {
        const int64_t first = begin + row;
        BlockGemm<T> block(thread.gemm, count, columns.total());
        if (layer.coded_x.codes) {
            multiply_codes(block, thread.gemm, layer.gate_up, expert, layer.coded_x, layer.routing.token + first, 0,
                           count, columns, after);
        } else {
            block.multiply_nt(layer.by_token(p.hidden_states, first), layer.H, layer.gate_up, expert, columns);
        }
        if (p.gate_up_rank) {
            block.multiply_nt({xa + first * p.gate_up_rank, p.gate_up_rank}, p.gate_up_rank, layer.B1, expert, columns);
        }
        for (int64_t i = 0; i < count; ++i) {
            Acc<T>* g = block.row(i);
            Acc<T>* u = g + columns.padded();
            if (p.gate_up_bias) {
                for (int64_t j = 0; j < n; ++j) g[j] += bias_g[j], u[j] += bias_u[j];
            }
            epilogue(first + i, g, u);
        }
    };
    for_each_row_block(layer.routing.rows(expert), block_of_rows, kSlabRows<T>);
}

}  // namespace kt::KT_ISA
