#pragma once

// Rows of [g | u]: the results of gate_up_proj, and their gradients, with a column for each row of the weight.

#include "gemm/scratch-inl.h"
#include "isa/vec-inl.h"
#include "moe/problem.h"

namespace kt::KT_ISA {

// Where g and u are in a row: in two halves, interleaved, or g alone, as the rows of gate_up_proj.
class GateUp {
public:
    explicit GateUp(const Problem& p) : gating_(p.gating), I_(p.intermediate_size) {}

    int64_t width() const { return gating_ == Gating::kNone ? I_ : 2 * I_; }

    // The number of columns in one range for n columns of h, and the first column for column j of h.
    int64_t count(int64_t n) const { return in_turn() ? 2 * n : n; }
    int64_t at(int64_t j) const { return in_turn() ? 2 * j : j; }

    // The number of columns of h for `rows` rows of gate_up_proj.
    int64_t count_in(int64_t rows) const { return gating_ == Gating::kNone ? rows : rows / 2; }

    // The columns for [column, column + n) of h.
    Columns columns(int64_t column, int64_t n) const {
        return {at(column), count(n), gating_ == Gating::kConcatenated ? I_ + column : -1};
    }

    // Loads g and u for columns [j, j + n) of h, n <= kLanes, from a row with u `apart` elements behind g if they are
    // in two halves.
    template <class T>
    void load(const T* row, int64_t apart, int64_t j, int64_t n, Vec<Acc<T>>& g, Vec<Acc<T>>& u) const {
        constexpr int64_t L = kLanes<Acc<T>>;
        if (in_turn()) {
            constexpr auto lanes = std::make_integer_sequence<int, L>();
            const T* from = row + 2 * j;
            const Vec<Acc<T>> x = load_n(from, smaller(2 * n, L));
            const Vec<Acc<T>> y = 2 * n > L ? load_n(from + L, 2 * n - L) : Vec<Acc<T>>{};
            g = split_lanes(x, y, 0, lanes);
            u = split_lanes(x, y, 1, lanes);
        } else {
            g = load_n(row + j, n);
            u = gating_ == Gating::kNone ? Vec<Acc<T>>{} : load_n(row + apart + j, n);
        }
    }

    template <class T>
    void store(T* row, int64_t apart, int64_t j, int64_t n, Vec<Acc<T>> g, Vec<Acc<T>> u) const {
        constexpr int64_t L = kLanes<Acc<T>>;
        if (in_turn()) {
            constexpr auto lanes = std::make_integer_sequence<int, L>();
            T* to = row + 2 * j;
            store_n(to, join_lanes(g, u, 0, lanes), smaller(2 * n, L));
            if (2 * n > L) store_n(to + L, join_lanes(g, u, 1, lanes), 2 * n - L);
        } else {
            store_n(row + j, g, n);
            if (gating_ != Gating::kNone) store_n(row + apart + j, u, n);
        }
    }

private:
    bool in_turn() const { return gating_ == Gating::kInterleaved; }

    Gating gating_;
    int64_t I_;
};

}  // namespace kt::KT_ISA
