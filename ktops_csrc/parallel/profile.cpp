#include "parallel/profile.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "core/environment.h"

namespace kt::profile {
namespace {

struct Row {
    const char* op;
    const char* name;
    Step step;
};

std::mutex mutex;
std::vector<Row> rows;
std::atomic<bool> is_enabled{environment::profile()};
thread_local Call* current_call = nullptr;

void record(const char* op, const char* name, const Step& values) {
    std::lock_guard<std::mutex> lock(mutex);
    for (Row& row : rows) {
        if (std::strcmp(row.op, op) || std::strcmp(row.name, name)) continue;
        row.step.calls += values.calls;
        row.step.tasks += values.tasks;
        row.step.busy += values.busy;
        row.step.wait += values.wait;
        row.step.wall += values.wall;
        return;
    }
    rows.push_back({op, name, values});
}

}  // namespace

bool set_enabled(bool enabled) { return is_enabled.exchange(enabled); }

bool enabled() { return is_enabled.load(std::memory_order_relaxed); }

std::string describe() {
    std::lock_guard<std::mutex> lock(mutex);
    std::string text;
    for (const Row& row : rows) {
        text += std::string(row.op) + " " + row.name;
        for (int64_t value : {row.step.calls, row.step.tasks, row.step.busy, row.step.wait, row.step.wall}) {
            text += " " + std::to_string(value);
        }
        text += "\n";
    }
    return text;
}

Call* Call::current() { return current_call; }

void Call::begin(const char* op) {
    op_ = op;
    outer_ = current_call;
    current_call = this;
    last_ = now();
}

void Call::end() {
    mark("finish");
    current_call = outer_;
}

void Call::mark(const char* step, bool busy) {
    const int64_t time = now(), wall = time - last_ - accounted_;
    last_ = time;
    accounted_ = 0;
    record(op_, step, {1, 1, busy ? wall : 0, busy ? 0 : wall, wall});
}

void Call::add(const char* step, const Step& values) {
    accounted_ += values.wall;
    record(op_, step, values);
}

}  // namespace kt::profile
