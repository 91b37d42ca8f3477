// Memory for testing kernels: a page after its last byte can be neither read nor written, and bytes that must not be
// written hold a guard value.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/bfloat16.h"

template <class T>
class Buffer {
public:
    // n elements that end where the page starts; an output is first rounded up to whole cache lines.
    Buffer(int64_t n, bool output) : size_(n) {
        const size_t data = static_cast<size_t>(n) * sizeof(T),
                     room = output ? (data + kLine - 1) / kLine * kLine : data;
        bytes_ = (room + kLine + kPage - 1) / kPage * kPage + kPage;
        void* block = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == MAP_FAILED) abort();
        block_ = static_cast<char*>(block);
        char* end = block_ + bytes_ - kPage;
        if (mprotect(end, kPage, PROT_NONE)) abort();
        std::memset(block_, kGuard, bytes_ - kPage);
        data_ = reinterpret_cast<T*>(end - room);
    }
    ~Buffer() { munmap(block_, bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() { return data_; }
    T& operator[](int64_t i) { return data_[i]; }
    int64_t size() const { return size_; }

    // True if element i was never written; true if no byte before the first or after the last element was.
    bool untouched(int64_t i) const { return guards(reinterpret_cast<const char*>(data_ + i), sizeof(T)); }
    bool guarded() const {
        const char *first = reinterpret_cast<const char*>(data_), *last = reinterpret_cast<const char*>(data_ + size_);
        return guards(block_, static_cast<size_t>(first - block_)) &&
               guards(last, static_cast<size_t>(block_ + bytes_ - kPage - last));
    }

private:
    static constexpr size_t kPage = 4096, kLine = 64;
    static constexpr unsigned char kGuard = 0xa5;

    static bool guards(const char* p, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            if (static_cast<unsigned char>(p[i]) != kGuard) return false;
        }
        return true;
    }

    int64_t size_;
    size_t bytes_;
    char* block_;
    T* data_;
};

template <class T>
struct Input : Buffer<T> {
    explicit Input(int64_t n) : Buffer<T>(n, false) {}
};
template <class T>
struct Output : Buffer<T> {
    explicit Output(int64_t n) : Buffer<T>(n, true) {}
};

// Returns a number in [low, high]; the sequence is the same in every run.
inline int64_t random_integer(int64_t low, int64_t high) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(high - low + 1));
}

// A matrix of random numbers in [-1, 1], its rows `stride` apart.
template <class T>
struct Matrix : Input<T> {
    static constexpr int64_t kSteps = 1 << 23;
    int64_t rows, columns, stride;

    Matrix(int64_t rows, int64_t columns, int64_t stride)
        : Input<T>((rows - 1) * stride + columns), rows(rows), columns(columns), stride(stride) {
        for (int64_t i = 0; i < this->size(); ++i) {
            const auto x = static_cast<kt::Acc<T>>(random_integer(-kSteps, kSteps)) / kSteps;
            (*this)[i] = kt::from_float<T>(x);
        }
    }
    T* row(int64_t i) { return this->data() + i * stride; }
    kt::Acc<T> at(int64_t i, int64_t j) { return kt::to_float((*this)[i * stride + j]); }
};

// Returns "ok", or `what` if the condition fails.
inline std::string expect(bool condition, const char* what) { return condition ? "ok" : what; }

// The largest error in A of a sum of n products whose magnitudes add up to `sum`: each product and each addition rounds
// once.
template <class A>
double error_bound(int64_t n, double sum) {
    return static_cast<double>(n + 1) * (sizeof(A) == 4 ? 0x1p-24 : 0x1p-53) * sum;
}
