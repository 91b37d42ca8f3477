#pragma once

// Shared by forward and backward: the layer's operands, and the products from which both are built.

#include <new>

#include "gemm/code_gemm-inl.h"
#include "gemm/outer_product-inl.h"
#include "gemm/panels_ahead-inl.h"
#include "moe/activation-inl.h"
#include "moe/gate_up-inl.h"
#include "moe/routing.h"
#include "weights/weight-inl.h"

namespace kt::KT_ISA {

// Sets up a thread for its work. Each ISA has its own type, so that the linker cannot merge functions of two ISAs.
struct Region : Isa::Region {};

// Columns of one task of a product along the rows of a weight; for gate_up, that many of g and of u. More if each task
// copies the rows of A.
template <class T>
constexpr int64_t kSlab = BlockGemm<T>::kCopiesRows ? 256 : 64;

// Columns of one task of a product with codes, which prefetches the codes of the task's next columns.
template <class T>
constexpr int64_t kCodeSlab = larger(kSlab<T>, 128);

// Columns of I over which <h, dh> is summed first; then these sums are added up.
constexpr int64_t kDotSlab = 64;

// Returns the columns of one task of a product down the rows of a weight: as many as fit for the expert with the most
// rows, up to kWideColumns, since memory is slow when read a few lines at a time.
inline int64_t wide_slab(const Routing& routing) {
    int64_t columns = kWideColumns;
    while (columns > kMaxColumns && columns * round_up(routing.most_rows, kRowStep) > kMaxRows * kMaxColumns)
        columns /= 2;
    return columns;
}

// The most columns of one task of dh while Wd is packed ahead: h of a block of rows, in panels, must fit in scratch.
constexpr int64_t kAheadSlab = 1024;

// Columns of one task of x W^T while no expert has more than kFewRowsMost rows: longer streams of memory, and rows of A
// that every task converts are converted less often.
constexpr int64_t kFewRowsSlab = 256, kFewRowsMost = 32;

// Experts whose rows are kept at a time, as indices into Routing::active, and their positions.
struct Portion {
    int64_t begin, end, first_position, end_position;
    bool is_first, is_last;
};

// The rows of the positions of a portion, [positions, H], which a separate phase adds up; and, if there is more than
// one portion, the sums so far. More than kCachedBytes of rows are stored past the caches. kKeptBytes bounds them,
// unless one expert has more: 4 bytes for each element of x, as many as the sums.
constexpr int64_t kCachedBytes = 32 << 20, kKeptBytes = 64 << 20;

template <class A>
struct KeptRows {
    A *rows, *sums;

    KeptRows(Workspace& workspace, const Problem& p, const Routing& routing, bool reduce)
        : routing_(routing),
          most_(kKeptBytes / larger(p.hidden_size, 1) / static_cast<int64_t>(sizeof(float))),
          all_(!reduce) {
        int64_t most = 0;
        bool several = false;
        for_each_portion([&](const Portion& portion) {
            most = larger(most, portion.end_position - portion.first_position);
            several = several || !portion.is_last;
        });
        rows = workspace.take<A>(reduce ? most * p.hidden_size : 0);
        sums = workspace.take<A>(several ? p.num_tokens * p.hidden_size : 0);
    }

    // Calls f(portion), at least once. Without reduce, no rows are kept, and all experts are one portion.
    template <class F>
    void for_each_portion(F f) const {
        const int64_t active = routing_.num_active;
        int64_t end = 0;
        do {
            const int64_t begin = end, first = position(begin);
            while (end < active && (end == begin || all_ || position(end + 1) - first <= most_)) ++end;
            f(Portion{begin, end, first, position(end), begin == 0, end == active});
        } while (end < active);
    }

private:
    int64_t position(int64_t i) const {
        return i < routing_.num_active ? routing_.offsets[routing_.active[i]] : routing_.num_routes;
    }

    const Routing& routing_;
    int64_t most_;
    bool all_;
};

// The least number of tasks for each thread.
constexpr int64_t kTasksOfThread = 4;

// Returns `width`, or less if there would be too few tasks for the threads. Results do not depend on it.
inline int64_t slab_width(int64_t width, int64_t columns, int64_t tasks_a_slab, int num_threads) {
    while (width > kPanelColumns && ceil_div(columns, width) * tasks_a_slab < kTasksOfThread * num_threads) width /= 2;
    return width;
}

template <class T>
struct Thread {
    GemmScratch<T> gemm;
    T* activations;  // [most rows of an expert, activation_columns]
    Acc<T>* bias;    // [kWideColumns]

    Thread(Workspace& w, const Problem& p, const Routing& routing, int64_t activation_columns)
        : gemm(w, p.forced_path),
          activations(w.take<T>(routing.most_rows * activation_columns)),
          bias(w.take<Acc<T>>(kWideColumns)) {}

    static Thread* take(Workspace& w, const Problem& p, const Routing& routing, int64_t activation_columns = 0) {
        auto* threads = w.take<Thread>(p.num_threads);
        for (int i = 0; i < p.num_threads; ++i) {
            const Thread thread(w, p, routing, activation_columns);
            if (threads) new (threads + i) Thread(thread);
        }
        return threads;
    }
};

// Returns the number of digits of activations in products with this weight, 0 for products in floats.
template <class T>
inline int code_digits(const Problem& p, const WeightTensor& weight) {
    if (std::is_same_v<T, double> || weight.is_dense() || !format_of(weight).code_group) return 0;
    const FormatTable& table = Weight<T>(weight).table();
    IntegerProducts products{};
    products.compute = p.compute;
    products.inference = p.inference;
    products.routes = p.num_tokens * p.top_k;
    products.experts = p.num_experts;
    products.words = table.pairs_in_word >= MicroDots::kLeastPairs;
    products.columns = weight.columns;
    products.group = code_group(weight);
    products.unit = table.code_columns;
    return choose_digits(products, kIsaLimits<T>, p.forced_path);
}

// Allocates `rows` rows of coded activations if products with this weight are computed in integers.
template <class T>
inline CodedRows take_coded(Workspace& workspace, const Problem& p, const Weight<T>& weight, int64_t rows) {
    const int digits = code_digits<T>(p, weight.tensor());
    return digits ? weight.take_codes(workspace, rows, digits) : CodedRows{};
}

// Quantizes row i of x, k elements, to row i of `rows`.
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
    const Acc<T>* route_weights;  // [num_routes], by position
    Weight<T> gate_up, down;
    StridedWeight<T> A1, B1, A2, B2;  // the scalings are folded into B
    GateUp halves;
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
          halves(problem),
          I(problem.intermediate_size),
          H(problem.hidden_size) {
        auto* weights = workspace.take<Acc<T>>(routing.num_routes);
        coded_x = take_coded(workspace, p, gate_up, p.num_tokens);
        route_weights = weights;
        if (!weights) return;
        for (int64_t i = 0; i < routing.num_routes; ++i) {
            weights[i] = p.reduce ? weight_of(routing.token[i], routing.route[i] % p.top_k) : 1;
        }
    }

    // The columns of one task of gate_up, for g and u each, and of down.
    int64_t gate_up_slab() const {
        return coded_x.codes ? kCodeSlab<T> : forward_slab(gate_up, 2, I, H, p.gate_up_rank);
    }
    int64_t down_slab() const { return forward_slab(down, 1, H, I, p.down_rank); }

    // Returns `width`, or less if the task of one expert would take more than a fraction of a thread's time.
    int64_t even_slab(int64_t width, int64_t columns) const {
        while (width > kMaxColumns &&
               width * routing.most_rows * kTasksOfThread * p.num_threads > columns * routing.num_routes)
            width /= 2;
        return width;
    }

    // The columns of one task of a product down the rows of a weight, of `columns`; and of what they are a multiple if
    // that is kPackedColumns.
    int64_t backward_slab(const Weight<T>& weight, int64_t most, int64_t k, int64_t columns) const {
        return packs_ahead(weight, k, columns) ? even_slab(most, columns) : wide_slab(routing);
    }
    int64_t ahead_step(const Weight<T>& weight, int64_t k, int64_t columns, int64_t otherwise) const {
        return packs_ahead(weight, k, columns) ? kPackedColumns : otherwise;
    }

    // True if x W^T for the rows of an expert, and LoRA's product of rank `rank`, is computed in bands.
    bool takes_bands(const Weight<T>& weight, int64_t expert, int64_t k, const Columns& columns, int64_t rank) const {
        const int64_t rows = routing.rows(expert);
        if (!prefers_bands<T>(weight, expert, rows, k, columns, rank, p.forced_path)) return false;
        profile::count_path(static_cast<int>(Path::kRowBands));
        return true;
    }

    // Must be called for every token before gate_up_product, if coded_x is used.
    void code_token(int64_t token) const { code_row(static_cast<const T*>(p.hidden_states), H, coded_x, token); }

    // Rows of a [T, H] tensor for the positions from `first` on.
    Rows<T> by_token(const void* tensor, int64_t first) const {
        return {static_cast<const T*>(tensor), H, routing.token + first};
    }

    // Rows of a tensor like the output: [T, H] or, without reduce, [T, K, H].
    Rows<T> like_output(const void* tensor, int64_t first) const {
        return {static_cast<const T*>(tensor), H, (p.reduce ? routing.token : routing.route) + first};
    }

private:
    // True if W is packed ahead for the expert with the most rows.
    bool packs_ahead(const Weight<T>& weight, int64_t k, int64_t columns) const {
        return prefers_ahead<T>(weight, 0, routing.most_rows, k, columns, p.forced_path);
    }

    // Returns the columns of one task of x W^T, of `columns`, with `ranges` ranges of that many. If products are
    // computed in bands, as many as a block of few rows may have, so that x is packed once, but no task takes more than
    // a fraction of a thread's time. If W is transposed, this is a product down the rows of the matrix in memory; then
    // a task is wide only if no expert has enough rows for panels: a panel of fewer columns covers more of k, so that C
    // is read and written less often.
    int64_t forward_slab(const Weight<T>& weight, int64_t ranges, int64_t columns, int64_t k, int64_t rank) const {
        if (weight.transposed) {
            const bool panels = routing.most_rows > kIsaLimits<T>.sums_rows;
            return larger(kSlab<T>, (panels ? kMaxColumns : wide_slab(routing)) / ranges);
        }
        if (prefers_bands<T>(weight, 0, routing.most_rows, k, {0, columns}, rank, p.forced_path)) {
            return even_slab(kWideColumns / ranges, columns);
        }
        return routing.most_rows > kFewRowsMost ? kSlab<T> : larger(kSlab<T>, kFewRowsSlab);
    }

    Acc<T> weight_of(int64_t token, int64_t slot) const { return static_cast<Acc<T>>(p.topk_weights.at(token, slot)); }
};

// Task number `task` of (active expert, slab) pairs, `slabs` per expert.
struct ExpertTask {
    int64_t expert, slab;
    ExpertTask(const Routing& routing, int64_t task, int64_t slabs)
        : expert(routing.active[task / slabs]), slab(task % slabs) {}
};

// The columns of x W^T or x W, in slabs of `width`, a multiple of `step`, for `tasks_a_slab` tasks each. The tasks have
// homes if they read whole rows of the matrix in memory, and not a part of every row.
struct Slabs {
    int64_t width, count;
    Homes homes;

    Slabs(int64_t most, int64_t columns, int64_t tasks_a_slab, int num_threads, bool reads_whole_rows,
          int64_t step = kPanelColumns)
        : width(larger(step, slab_width(most, columns, tasks_a_slab, num_threads))) {
        if (reads_whole_rows) {
            width = width_within_nodes(columns, width, step);
            homes = homes_of_slabs(columns, width);
        }
        count = ceil_div(columns, width);
    }
};

// Returns the rows of W for the task that a thread most likely takes after `task`. rows_a_column: of W for a column.
inline NextRows rows_of_next(const Problem& p, const Routing& routing, int64_t task, const Slabs& slabs,
                             int64_t rows_a_column = 1) {
    const int64_t next = slabs.homes.after(task, p.num_threads);
    if (next >= routing.num_active * slabs.count) return {};
    const ExpertTask at(routing, next, slabs.count);
    return {at.expert, at.slab * slabs.width * rows_a_column};
}

// Multiplies rows of an expert with `columns` of W, of [k, width], while W is packed ahead, if that is best; then
// returns true. Calls put as PanelsAhead does. after: the first of the columns of W that the thread probably needs
// next.
template <class T, class Put>
inline bool multiply_ahead(const GemmScratch<T>& scratch, const Layer<T>& layer, const Weight<T>& w, int64_t expert,
                           const Rows<T>& a, int64_t rows, int64_t k, int64_t width, const Columns& columns,
                           const NextRows& after, Put put) {
    if constexpr (kPacksAhead<T>) {
        if (!prefers_ahead<T>(w, expert, layer.routing.rows(expert), k, width, layer.p.forced_path)) return false;
        profile::count_path(static_cast<int>(Path::kPanelsAhead));
        PanelsAhead ahead(scratch, w, expert, k, columns.first, columns.count, after);
        ahead.multiply(a, rows, put);
        return true;
    }
    return false;
}

// out[row][0 .. rank) = a . A^T (kTransposed) or a . B, for all rows of one expert.
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

// [g | u] = x Wgu^T + s1 xa B1^T + bgu for columns [column, column + n) of h. Calls epilogue(position, count, j, m, c,
// ldc, apart) for columns [column + j, column + j + m) of h at `count` positions: rows of accumulators, ldc apart, for
// layer.halves.load(). after: rows of the thread's next task.
template <class T, class Epilogue>
inline void gate_up_product(const Thread<T>& thread, const Layer<T>& layer, int64_t expert, int64_t column, int64_t n,
                            const T* xa, const NextRows& after, Epilogue epilogue) {
    const Problem& p = layer.p;
    const int64_t begin = layer.routing.offsets[expert], rows = layer.routing.rows(expert), rank = p.gate_up_rank;
    const Columns columns = layer.halves.columns(column, n);
    for_each_range(columns, thread.bias,
                   [&](int64_t first, Acc<T>* bias) { load_bias(p.gate_up_bias, expert, first, columns.count, bias); });
    const auto add_bias = [&](int64_t count, const Columns& part, Acc<T>* c, int64_t ldc) {
        if (!p.gate_up_bias) return;
        for (int64_t i = 0; i < count; ++i, c += ldc) {
            for_each_range(part, c, [&](int64_t first, Acc<T>* to) {
                const Acc<T>* bias = thread.bias + columns.at(first);
                for (int64_t j = 0; j < part.count; ++j) to[j] += bias[j];
            });
        }
    };
    const Rows<T> low{xa + begin * rank, rank};
    if constexpr (kHasBands<T>) {
        if (!layer.coded_x.codes && layer.takes_bands(layer.gate_up, expert, layer.H, columns, rank)) {
            const AddedProduct<T, StridedWeight<T>> added{low, rank, &layer.B1};
            const int64_t step = layer.halves.count_in(kBandRows);
            RowBands bands(thread.gemm, layer.by_token(p.hidden_states, begin), rows, layer.H, layer.gate_up, expert,
                           added, after);
            const auto band = [&](int64_t j) { return layer.halves.columns(column + j, smaller(step, n - j)); };
            bands.multiply(n, step, band,
                           [&](int64_t i, int64_t count, int64_t j, const Columns& part, Acc<T>* c, int64_t ldc) {
                               add_bias(count, part, c, ldc);
                               epilogue(begin + i, count, j, smaller(step, n - j), c, ldc, part.padded());
                           });
            return;
        }
    }
    const auto block_of_rows = [&](int64_t row, int64_t count) {
        const int64_t first = begin + row;
        BlockGemm<T> block(thread.gemm, count, columns.total());
        if (layer.coded_x.codes) {
            multiply_codes(block, thread.gemm, layer.gate_up, expert, layer.coded_x, layer.routing.token + first, 0,
                           count, columns, after);
        } else {
            block.multiply_nt(layer.by_token(p.hidden_states, first), layer.H, layer.gate_up, expert, columns);
        }
        if (rank) block.multiply_nt(low.from(row), rank, layer.B1, expert, columns);
        add_bias(count, columns, block.row(0), columns.total());
        epilogue(first, count, 0, n, block.row(0), columns.total(), columns.padded());
    };
    for_each_row_block(rows, block_of_rows, most_rows_of_block(columns.total()));
}

}  // namespace kt::KT_ISA
