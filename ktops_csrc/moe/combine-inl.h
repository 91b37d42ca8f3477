#pragma once

// out[t] = sum of a product's rows at the positions of token t, experts in ascending order. Or, without reduce,
// out[route] = the row at its position.

#include "moe/layer-inl.h"

namespace kt::KT_ISA {

// Product has
//   multiply(thread, block, expert, first, count, columns, after)    computes rows [first, first + count);
//                                       after: the rows of the weight to prefetch
//   multiply_parts(thread, expert, first, count, columns, after, put)    the same in parts of columns, if that is best,
//                                       and returns true: put(i, n, j, part, c, ldc) for row i and column j on
//   step()                              of which the columns of a task are a multiple
//   start(thread, expert, column, n)    prepares value() for these columns
//   value(thread, position, c, j)       the value to add for vector c of the row, j columns after `column`
template <class T, class Product>
class Combine {
    using A = Acc<T>;

public:
    // The rows of a portion of the experts. slab: the most columns of a task. reads_whole_rows: whether a task reads
    // whole rows of the product's weight.
    Combine(const Layer<T>& layer, const Thread<T>* threads, const Product& product, const KeptRows<A>& kept,
            const Portion& portion, T* out, int64_t slab, bool reads_whole_rows, bool reduce = true)
        : layer_(layer),
          routing_(layer.routing),
          threads_(threads),
          product_(product),
          kept_(kept),
          portion_(portion),
          reduce_(reduce),
          out_(out),
          slabs_(slab, layer.H, portion.end - portion.begin, layer.p.num_threads, reads_whole_rows, product.step()) {
        const int64_t elements = (portion.end_position - portion.first_position) * layer.H;
        past_caches_ = elements * static_cast<int64_t>(sizeof(A)) > kCachedBytes && layer.H % kPanelColumns == 0;
    }

    const Homes& homes() const { return slabs_.homes; }
    int64_t num_tasks() const { return slabs_.count * (portion_.end - portion_.begin); }
    void run(int64_t task, int thread) const {
        const int64_t column = task % slabs_.count * slabs_.width, n = smaller(slabs_.width, layer_.H - column);
        task += portion_.begin * slabs_.count;
        put_rows(threads_[thread], routing_.active[task / slabs_.count], column, n,
                 rows_of_next(layer_.p, routing_, task, slabs_));
    }

    // Must be called after run() for all tasks.
    int64_t num_sums() const { return reduce_ ? layer_.p.num_tokens : 0; }
    void sum(int64_t token) const {
        const int32_t* positions = routing_.positions + token * layer_.p.top_k;
        const auto is_before = [&](int64_t i, int64_t end) {
            return i < layer_.p.top_k && positions[i] >= 0 && positions[i] < end;
        };
        int64_t begin = 0;
        while (is_before(begin, portion_.first_position)) ++begin;
        A* so_far = kept_.sums + token * layer_.H;
        for_each_vector<A>(layer_.H, [&](int64_t j, int64_t n) {
            Vec<A> sum = portion_.is_first ? Vec<A>{} : load_n(so_far + j, n);
            for (int64_t i = begin; is_before(i, portion_.end_position); ++i) sum += load_n(row(positions[i]) + j, n);
            if (portion_.is_last) {
                store_n(out_ + token * layer_.H + j, sum, n);
            } else {
                store_n(so_far + j, sum, n);
            }
        });
    }

private:
    // Calls put(position, c, j, m) with elements [j, j + m) of the rows of positions [begin, end) of an expert.
    template <class Put>
    void rows(const Thread<T>& thread, int64_t expert, int64_t begin, int64_t end, int64_t column, int64_t n,
              const NextRows& after, Put put) const {
        const Columns columns{column, n};
        product_.start(thread, expert, column, n);
        const auto put_part = [&](int64_t row, int64_t count, int64_t j, const Columns& part, const A* c, int64_t ldc) {
            for (int64_t i = 0; i < count; ++i, c += ldc) put(begin + row + i, c, j, part.count);
        };
        if (product_.multiply_parts(thread, expert, begin, end - begin, columns, after, put_part)) return;
        const auto block_of_rows = [&](int64_t row, int64_t count) {
            BlockGemm<T> block(thread.gemm, count, columns.padded());
            product_.multiply(thread, block, expert, begin + row, count, columns, after);
            put_part(row, count, 0, columns, block.row(0), columns.padded());
        };
        for_each_row_block(end - begin, block_of_rows, most_rows_of_block(columns.padded()));
    }

    void put_rows(const Thread<T>& thread, int64_t expert, int64_t column, int64_t n, const NextRows& after) const {
        const auto put = [&](int64_t position, const A* c, int64_t j, int64_t m, auto* to_row) {
            for_each_vector<A>(m, [&](int64_t v, int64_t count) {
                const Vec<A> value = product_.value(thread, position, load(c + v), j + v);
                auto* to = to_row + column + j + v;
                if constexpr (std::is_same_v<decltype(to), A*>) {
                    if (past_caches_) return store_past_caches(to, value);
                }
                store_n(to, value, count);
            });
        };
        rows(thread, expert, routing_.offsets[expert], routing_.offsets[expert + 1], column, n, after,
             [&](int64_t position, const A* c, int64_t j, int64_t m) {
                 if (reduce_) {
                     put(position, c, j, m, row(position));
                 } else {
                     put(position, c, j, m, out_ + routing_.route[position] * layer_.H);
                 }
             });
    }

    A* row(int64_t position) const { return kept_.rows + (position - portion_.first_position) * layer_.H; }

    const Layer<T>& layer_;
    const Routing& routing_;
    const Thread<T>* threads_;
    const Product& product_;
    const KeptRows<A>& kept_;
    const Portion portion_;
    bool reduce_, past_caches_;
    T* out_;
    Slabs slabs_;
};

}  // namespace kt::KT_ISA
