#include "streams/calls.h"

#include <pthread.h>

#include <cstring>
#include <stdexcept>
#include <utility>

namespace kt::streams {

// Counts who may still use it: the caller, from begin() to end(); the worker and then the host function that waits, or,
// if the call was captured, the graph. The last one adds it to the finished calls.
class Call : public Task {
public:
    Call(Calls& calls, Block block, Result result, std::unique_ptr<Work> work)
        : calls(calls), block(std::move(block)), result(result), work_(std::move(work)) {}

    bool captured() const { return block.place().captured(); }

    void run() override {
        try {
            work_->run();
        } catch (...) {
            std::memset(result.host, 0xFF, result.bytes);  // NaN in every floating dtype
            throw;
        }
    }
    void finished() override {
        if (!captured()) work_.reset();  // the weights, which a model that is deleted meanwhile no longer has
        leave();
    }

    void enter() { users_.fetch_add(1, std::memory_order_relaxed); }
    void leave() {
        if (users_.fetch_sub(1, std::memory_order_acq_rel) == 1) calls.add_finished(this);
    }

    Calls& calls;
    Block block;
    const Result result;
    std::atomic<bool> abandoned{false};  // of captured calls: nothing waits for the worker
    Call* next = nullptr;

private:
    std::unique_ptr<Work> work_;
    std::atomic<int> users_{2};
};

namespace {

Stream const kPerThreadStream = reinterpret_cast<Stream>(2);  // another stream in every thread, which has no name here

std::atomic<Calls*> current_calls{nullptr};

// A child has neither CUDA nor the worker. Its parent's calls are left alone.
void start_anew_in_child(Calls* (*anew)(const Calls&)) {
    if (const Calls* parent = current_calls) current_calls = anew(*parent);
}

}  // namespace

Calls::Calls(std::shared_ptr<const Runtime> runtime) : runtime_(std::move(runtime)), staging_(*runtime_) {}

// Never destroyed: the threads of CUDA may outlive static objects.
void Calls::load(const std::string& path) {
    static const int failed = pthread_atfork(
        nullptr, nullptr, [] { start_anew_in_child([](const Calls& parent) { return new Calls(parent.runtime_); }); });
    if (failed) throw std::runtime_error("kt: pthread_atfork failed");
    current_calls = new Calls(std::make_shared<const Runtime>(path));
}

Calls* Calls::current() { return current_calls; }

Block Calls::stage(Stream stream, size_t bytes) {
    if (stream == kPerThreadStream) throw std::runtime_error("kt::moe_fwd: stream must not be cudaStreamPerThread");
    return staging_.take({runtime_->current_device(), stream, runtime_->capture(stream)}, bytes);
}

int64_t Calls::begin(Block block, std::initializer_list<Input> inputs, Result result, std::unique_ptr<Work> work,
                     int num_threads) {
    if (worker_.stopped()) throw std::runtime_error("kt::moe_fwd: Python is exiting");
    worker_.start(num_threads);
    const Place place = block.place();
    Call* call = new Call(*this, std::move(block), result, std::move(work));
    try {
        if (place.captured()) runtime_->keep_with_graph(place.capture.graph, call, forget);
        call->block.begin();
        for (const Input& input : inputs) runtime_->copy_to_host(input.host, input.device, input.bytes, place.stream);
        runtime_->call_in_order(place.stream, submit, call);
    } catch (...) {
        if (!place.captured()) call->leave();
        drop(call);
        throw;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    begun_[++last_number_] = call;
    return last_number_;
}

void Calls::end(int64_t number, void* output, size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = begun_.find(number);
    if (found == begun_.end()) {
        throw std::runtime_error("kt::moe_fwd_end: call must be one that began and did not end, got " +
                                 std::to_string(number));
    }
    Call* call = found->second;
    if (bytes != call->result.bytes) {
        throw std::runtime_error("kt::moe_fwd_end: output must have " + std::to_string(call->result.bytes) +
                                 " bytes, got " + std::to_string(bytes));
    }
    const Place place = call->block.place();
    if (runtime_->capture(place.stream).id != place.capture.id) {
        throw std::runtime_error(
            place.captured() ? "kt::moe_fwd: the result of a call that was captured must be used in the same capture"
                             : "kt::moe_fwd: the result of a call before a capture must be used before it");
    }
    begun_.erase(found);
    lock.unlock();
    collect(call, output);
}

void Calls::collect(Call* call, void* output) {
    const bool captured = call->captured();
    const Stream stream = call->block.place().stream;
    if (!captured) call->enter();  // wait() leaves
    try {
        runtime_->call_in_order(stream, wait, call);
    } catch (...) {
        if (!captured) call->leave();
        drop(call);
        throw;
    }
    try {
        runtime_->copy_to_device(output, call->result.host, call->result.bytes, stream);
        call->block.give_back();
    } catch (...) {
        drop(call);
        throw;
    }
    call->leave();
}

void Calls::abandon(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = begun_.find(number);
    if (found == begun_.end()) return;
    found->second->block.over_when_destroyed();  // the call outlives its computation
    drop(found->second);
    begun_.erase(found);
}

void Calls::drop(Call* call) {
    call->abandoned = true;
    call->leave();
}

void Calls::submit(void* argument) {
    Call* call = static_cast<Call*>(argument);
    if (call->captured()) {
        if (call->abandoned) return;
        call->enter();  // every launch of the graph is left once
    }
    call->calls.worker_.submit(call);
}

void Calls::wait(void* argument) {
    Call* call = static_cast<Call*>(argument);
    call->calls.worker_.wait(call);
    if (!call->captured()) call->leave();
}

void Calls::forget(void* argument) { static_cast<Call*>(argument)->leave(); }

void Calls::add_finished(Call* call) {
    call->next = finished_.load(std::memory_order_relaxed);
    while (!finished_.compare_exchange_weak(call->next, call, std::memory_order_release, std::memory_order_relaxed)) {
    }
}

void Calls::destroy_finished() {
    Call* call = finished_.exchange(nullptr, std::memory_order_acquire);
    while (call) {
        Call* next = call->next;
        delete call;
        call = next;
    }
}

void Calls::settle() {
    destroy_finished();
    const std::string error = worker_.take_error();
    if (!error.empty()) {
        throw std::runtime_error("kt::moe_fwd: an earlier call failed on the CPU, and its result is NaN: " + error);
    }
}

void Calls::synchronize() {
    staging_.synchronize();
    worker_.wait_for_all();
    settle();
}

void Calls::release() {
    if (staging_.bytes()) staging_.synchronize();  // finishes calls
    destroy_finished();
    staging_.release();
}

void Calls::stop() { worker_.stop(); }

}  // namespace kt::streams
