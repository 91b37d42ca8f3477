#pragma once

// out[t] = sum of a product's rows at the positions of token t, experts in ascending order. Or, without reduce,
// out[route] = the row at its position.

#include "moe/layer-inl.h"

namespace kt::KT_ISA {

// Returns the first i in [begin, end) with sorted[i] >= value, else end.
inline int64_t lower_bound(const int32_t* sorted, int64_t begin, int64_t end, int64_t value) {
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (sorted[middle] < value) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

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
    // slab: the most columns of a task of one expert. reads_whole_rows: whether a task reads whole rows of the
    // product's weight.
    Combine(const Layer<T>& layer, const Thread<T>* threads, const Product& product, const KeptRows<A>& kept, T* out,
            int64_t slab, bool reads_whole_rows, bool reduce = true)
        : layer_(layer),
          routing_(layer.routing),
          threads_(threads),
          product_(product),
          reduce_(reduce),
          by_expert_(!reduce || kept.kept),
          past_caches_(kept_bytes(layer.p, layer.routing) > kKeptBytes && layer.H % kPanelColumns == 0),
          kept_rows_(kept.rows),
          out_(out),
          tasks_a_slab_(by_expert_ ? routing_.num_active : ceil_div(layer.p.num_tokens, kTokenBlock)),
          slabs_(by_expert_ ? slab : kSumSlab, layer.H, tasks_a_slab_, layer.p.num_threads, reads_whole_rows,
                 product.step()) {}

    const Homes& homes() const { return slabs_.homes; }
    int64_t num_tasks() const { return slabs_.count * tasks_a_slab_; }
    void run(int64_t task, int thread) const {
        const int64_t column = task % slabs_.count * slabs_.width, n = smaller(slabs_.width, layer_.H - column);
        if (by_expert_) {
            put_rows(threads_[thread], routing_.active[task / slabs_.count], column, n,
                     rows_of_next(layer_.p, routing_, task, slabs_));
        } else {
            sum_block(threads_[thread], task / slabs_.count * kTokenBlock, column, n);
        }
    }

    // Must be called after run() for all tasks.
    int64_t num_sums() const { return reduce_ && by_expert_ ? layer_.p.num_tokens : 0; }
    void sum(int64_t token) const {
        const int32_t* positions = routing_.positions + token * layer_.p.top_k;
        for_each_vector<A>(layer_.H, [&](int64_t j, int64_t n) {
            Vec<A> sum{};
            for (int64_t i = 0; i < layer_.p.top_k && positions[i] >= 0; ++i) {
                sum += load_n(kept_rows_ + positions[i] * layer_.H + j, n);
            }
            store_n(out_ + token * layer_.H + j, sum, n);
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
        const auto put = [&](int64_t position, const A* c, int64_t j, int64_t m, auto* row) {
            for_each_vector<A>(m, [&](int64_t v, int64_t count) {
                const Vec<A> value = product_.value(thread, position, load(c + v), j + v);
                auto* to = row + column + j + v;
                if constexpr (std::is_same_v<decltype(to), A*>) {
                    if (past_caches_) return store_past_caches(to, value);
                }
                store_n(to, value, count);
            });
        };
        rows(thread, expert, routing_.offsets[expert], routing_.offsets[expert + 1], column, n, after,
             [&](int64_t position, const A* c, int64_t j, int64_t m) {
                 if (reduce_) {
                     put(position, c, j, m, kept_rows_ + position * layer_.H);
                 } else {
                     put(position, c, j, m, out_ + routing_.route[position] * layer_.H);
                 }
             });
    }

    __attribute__((always_inline)) static void prefetch_row(const A* row, int64_t n) {
        for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(A))) __builtin_prefetch(row + j, 1);
    }

    void sum_block(const Thread<T>& thread, int64_t first_token, int64_t column, int64_t n) const {
        const int64_t tokens = smaller(kTokenBlock, layer_.p.num_tokens - first_token),
                      padded = round_up(n, kPanelColumns);
        for (int64_t i = 0; i < tokens * padded; ++i) thread.sums[i] = 0;
        for (int64_t a = 0; a < routing_.num_active; ++a) {
            const int64_t expert = routing_.active[a];
            int64_t begin = routing_.offsets[expert], end = routing_.offsets[expert + 1];
            begin = lower_bound(routing_.token, begin, end, first_token);
            end = lower_bound(routing_.token, begin, end, first_token + tokens);
            if (begin == end) continue;
            const NextRows after = a + 1 < routing_.num_active ? NextRows{routing_.active[a + 1], column} : NextRows{};
            rows(thread, expert, begin, end, column, n, after,
                 [&](int64_t position, const A* c, int64_t first, int64_t m) {
                     const auto sums_of = [&](int64_t r) {
                         return thread.sums + (routing_.token[r] - first_token) * padded;
                     };
                     A* sums = sums_of(position);
                     if (position + 1 < end) prefetch_row(sums_of(position + 1) + first, m);
                     for (int64_t j = 0; j < round_up(m, kPanelColumns); j += kLanes<A>) {
                         A* sum = sums + first + j;
                         store(sum, load(sum) + product_.value(thread, position, load(c + j), first + j));
                     }
                 });
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const A* sum = thread.sums + t * padded;
            T* to = out_ + (first_token + t) * layer_.H + column;
            for_each_vector<A>(n, [&](int64_t j, int64_t count) { store_n(to + j, load(sum + j), count); });
        }
    }

    const Layer<T>& layer_;
    const Routing& routing_;
    const Thread<T>* threads_;
    const Product& product_;
    bool reduce_, by_expert_, past_caches_;
    A* kept_rows_;
    T* out_;
    int64_t tasks_a_slab_;
    Slabs slabs_;
};

}  // namespace kt::KT_ISA
