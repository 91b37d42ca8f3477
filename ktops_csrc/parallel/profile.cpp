#include "parallel/profile.h"

#include <atomic>
#include <cstddef>
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
size_t last = 0;  // the row recorded last
std::atomic<bool> is_enabled{environment::profile()};
thread_local Call* current_call = nullptr;

void record(const char* op, const char* name, const Step& values) {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < rows.size(); ++i) {
        if (std::strcmp(rows[i].op, op) || std::strcmp(rows[i].name, name)) continue;
        Step& step = rows[i].step;
        step.calls += values.calls;
        step.tasks += values.tasks;
        step.busy += values.busy;
        step.wait += values.wait;
        step.wall += values.wall;
        step.at_home += values.at_home;
        step.stolen += values.stolen;
        for (size_t p = 0; p < values.paths.size(); ++p) step.paths[p] += values.paths[p];
        last = i;
        return;
    }
    // A step that earlier calls of the operator did not have is listed after the one before it in this call.
    last = !rows.empty() && !std::strcmp(rows[last].op, op) ? last + 1 : rows.size();
    rows.insert(rows.begin() + static_cast<std::ptrdiff_t>(last), {op, name, values});
}

}  // namespace

bool set_enabled(bool enabled) { return is_enabled.exchange(enabled); }

bool enabled() { return is_enabled.load(std::memory_order_relaxed); }

std::string describe(const char* const* path_names) {
    std::lock_guard<std::mutex> lock(mutex);
    std::string text;
    for (const Row& row : rows) {
        text += std::string(row.op) + " " + row.name;
        const Step& step = row.step;
        for (int64_t value : {step.calls, step.tasks, step.busy, step.wait, step.wall, step.at_home, step.stolen}) {
            text += " " + std::to_string(value);
        }
        for (size_t p = 0; p < step.paths.size(); ++p) {
            if (step.paths[p]) text += std::string(" ") + path_names[p] + "=" + std::to_string(step.paths[p]);
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
    record(op_, step, {1, 1, busy ? wall : 0, busy ? 0 : wall, wall, {}});
}

void Call::add(const char* step, const Step& values) {
    accounted_ += values.wall;
    record(op_, step, values);
}

}  // namespace kt::profile
