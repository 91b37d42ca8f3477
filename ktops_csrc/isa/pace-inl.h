#pragma once

// Work that is done between the steps of a product: so many units, spread evenly over its steps.

#include <cstdint>
#include <utility>

#include "core/views.h"

namespace kt::KT_ISA {

class Pace {
public:
    void start(int64_t units, int64_t steps) {
        left_ = units;
        rate_ = units * kOne / larger(steps, 1) + 1;
        credit_ = 0;
    }

    // The units that will be due in so many steps.
    int64_t due(int64_t steps) const { return (credit_ + steps * rate_) / kOne; }

    // Units that are not possible yet are held back, and allowed when they are.
    int64_t hold() { return std::exchange(left_, 0); }
    void allow(int64_t units) { left_ += units; }
    int64_t left() const { return left_; }

    // Calls work() for the units that are due.
    template <class Work>
    __attribute__((always_inline)) void step(Work work) {
        for (credit_ += rate_; credit_ >= kOne && left_ > 0; credit_ -= kOne, --left_) work();
    }

    // Calls work() for all units that are left.
    template <class Work>
    void finish(Work work) {
        for (; left_ > 0; --left_) work();
    }

private:
    static constexpr int64_t kOne = 256;  // rate and credit are in units of 1 / kOne

    int64_t left_ = 0, rate_ = 0, credit_ = 0;
};

}  // namespace kt::KT_ISA
