// Runs calls of ktops_csrc/streams on the streams of fake_cuda, from several threads that stand for Python's.
// Arguments: INTERLEAVINGS. Every thread has a stream, on which it computes call after call with the same device
// memory. The "CPU part" is 2 x + 1. Exit status 1: a wrong result; 2: a missing or unexpected error; 3: memory is
// left; 4: the streams, or the calls of a graph, have shared no memory.

#include "../ktops/testing/fake_cuda/fake_cuda.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "streams/calls.h"

namespace {

using kt::streams::Block;
using kt::streams::Calls;

constexpr int kThreads = 6;
constexpr int kMostCalls = 4;
constexpr int kDeviceToDevice = 3;
constexpr int kLaunches = 3;

class Double : public kt::streams::Work {
public:
    Double(const int64_t* x, int64_t* y, size_t n, bool fails) : x_(x), y_(y), n_(n), fails_(fails) {}
    void run() override {
        if (fails_) throw std::runtime_error("no memory");
        for (size_t i = 0; i < n_; ++i) y_[i] = 2 * x_[i] + 1;
    }

private:
    const int64_t* x_;
    int64_t* y_;
    size_t n_;
    bool fails_;
};

int64_t begin(Calls& calls, void* stream, const std::vector<int64_t>& x, bool fails = false) {
    const size_t bytes = x.size() * sizeof(int64_t);
    Block block = calls.stage(stream, 2 * bytes);
    auto* const input = reinterpret_cast<int64_t*>(block.data());
    int64_t* const output = input + x.size();
    auto work = std::make_unique<Double>(input, output, x.size(), fails);
    const kt::streams::Input copy{input, x.data(), bytes};
    return calls.begin(std::move(block), {copy}, {output, bytes}, std::move(work), 1);
}

void copy(std::vector<int64_t>& to, const std::vector<int64_t>& from, void* stream) {
    const size_t bytes = to.size() * sizeof(int64_t);
    if (cudaMemcpyAsync(to.data(), from.data(), bytes, kDeviceToDevice, stream)) std::_Exit(2);
}

// One thread's part of an interleaving: calls that reuse x and y, ended in the order of their beginnings or not at all.
class Program {
public:
    Program(unsigned seed, void* stream) : random_(seed), stream_(stream) {
        const size_t n = 1 + random_() % 600;
        x_.resize(n);
        const size_t calls = 1 + random_() % kMostCalls;
        given_.resize(calls, std::vector<int64_t>(n));
        results_.resize(calls, std::vector<int64_t>(n, -1));
        for (auto& values : given_) {
            for (int64_t& value : values) value = static_cast<int64_t>(random_() % 1000);
        }
        y_.resize(calls, std::vector<int64_t>(n));
    }

    void enqueue(Calls& calls) {
        std::vector<int64_t> open;
        size_t ended = 0;
        for (size_t i = 0; i < given_.size(); ++i) {
            copy(x_, given_[i], stream_);
            open.push_back(begin(calls, stream_, x_));
            while (ended < open.size() && random_() % 2) end(calls, open, ended++);
            if (random_() % 8 == 0) calls.release();
        }
        while (ended < open.size()) end(calls, open, ended++);
    }

    bool correct() const {
        for (size_t i = 0; i < given_.size(); ++i) {
            for (size_t j = 0; j < x_.size(); ++j) {
                if (results_[i][j] != (i == abandoned_ ? -1 : 2 * given_[i][j] + 1)) return false;
            }
        }
        return true;
    }

private:
    void end(Calls& calls, const std::vector<int64_t>& open, size_t i) {
        if (abandoned_ == kNone && random_() % 8 == 0) {
            abandoned_ = i;
            return calls.abandon(open[i]);
        }
        calls.end(open[i], y_[i].data(), y_[i].size() * sizeof(int64_t));
        copy(results_[i], y_[i], stream_);
    }

    static constexpr size_t kNone = ~size_t{0};
    std::mt19937 random_;
    void* stream_;
    std::vector<int64_t> x_;
    std::vector<std::vector<int64_t>> given_, y_, results_;
    size_t abandoned_ = kNone;
};

void interleave(Calls& calls, const std::array<void*, kThreads>& streams, unsigned seed) {
    fake_set_delays(seed, seed % 3 * 30);
    fake_serialize_host_functions(seed % 2);
    std::vector<Program> programs;
    for (unsigned i = 0; i < kThreads; ++i) programs.emplace_back(seed * kThreads + i, streams[i]);
    std::vector<std::thread> threads;
    for (Program& program : programs) threads.emplace_back([&] { program.enqueue(calls); });
    for (std::thread& thread : threads) thread.join();
    calls.synchronize();
    for (const Program& program : programs) {
        if (!program.correct()) std::_Exit(1);
    }
}

// A graph of two calls, launched with other inputs, then destroyed while its last launch is executed.
void replay(Calls& calls, void* stream, unsigned seed) {
    fake_set_delays(seed, 200);
    std::vector<int64_t> x(100), y(100), z(100);
    void *graph = nullptr, *exec = nullptr;
    cudaStreamBeginCapture(stream, 0);
    calls.end(begin(calls, stream, x), y.data(), y.size() * sizeof(int64_t));
    const int64_t held = fake_pinned_bytes();
    calls.end(begin(calls, stream, y), z.data(), z.size() * sizeof(int64_t));
    if (fake_pinned_bytes() != held) std::_Exit(4);
    if (cudaStreamEndCapture(stream, &graph) || cudaGraphInstantiate(&exec, graph, 0)) std::_Exit(2);
    cudaGraphDestroy(graph);
    std::vector<std::vector<int64_t>> given(kLaunches), results(kLaunches, y);
    for (int launch = 0; launch < kLaunches; ++launch) {
        given[launch].assign(100, 10 * launch);
        copy(x, given[launch], stream);
        cudaGraphLaunch(exec, stream);
        copy(results[launch], z, stream);
    }
    cudaGraphExecDestroy(exec);
    calls.synchronize();
    for (int launch = 0; launch < kLaunches; ++launch) {
        if (results[launch] != std::vector<int64_t>(100, 40 * launch + 3)) std::_Exit(1);
    }
}

void expect_failure(Calls& calls, void* stream) {
    std::vector<int64_t> x(100, 1), y(100);
    calls.end(begin(calls, stream, x, true), y.data(), y.size() * sizeof(int64_t));
    try {
        calls.synchronize();
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
        if (y != std::vector<int64_t>(100, -1)) std::_Exit(1);  // the bytes of NaN
        return;
    }
    std::_Exit(2);
}

}  // namespace

int main(int, char** argv) {
    Calls::load("");
    Calls& calls = *Calls::current();
    std::array<void*, kThreads> streams;
    for (void*& stream : streams) cudaStreamCreate(&stream);
    const unsigned interleavings = static_cast<unsigned>(std::atoi(argv[1]));
    for (unsigned seed = 0; seed < interleavings; ++seed) {
        interleave(calls, streams, seed);
        if (seed % 50 == 0) replay(calls, streams[0], seed);
        if (seed == 0) expect_failure(calls, streams[1]);
    }
    if (!fake_calls("cudaStreamWaitEvent")) return 4;
    fake_set_delays(0, 0);
    fake_wait_for_destructors();
    calls.release();
    if (fake_pinned_bytes() || calls.staged_bytes()) return 3;
    static std::vector<int64_t> x(100, 1), y(100);  // destroyed after what fake_drain_at_exit does
    fake_drain_at_exit();
    fake_block(streams[0]);
    calls.end(begin(calls, streams[0], x), y.data(), y.size() * sizeof(int64_t));
    calls.stop();
}
