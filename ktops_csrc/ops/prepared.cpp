// kt::moe_fwd for experts whose arguments are checked once: a call is given the tokens only.

#include <pthread.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dispatch/table.h"
#include "ops/moe_arguments.h"

namespace kt::ops {
namespace {

// What a tensor was when the Problem was made: weight.data = ... and the like give it other memory.
class Snapshot {
public:
    explicit Snapshot(const Tensor& tensor)
        : tensor_(tensor),
          data_(tensor.const_data_ptr()),
          type_(tensor.scalar_type()),
          sizes_(tensor.sizes().begin(), tensor.sizes().end()),
          strides_(tensor.strides().begin(), tensor.strides().end()) {}

    bool holds() const {
        const auto same = [](const auto& now, const std::vector<int64_t>& then) {
            return std::equal(now.begin(), now.end(), then.begin(), then.end());
        };
        return tensor_.const_data_ptr() == data_ && tensor_.scalar_type() == type_ && same(tensor_.sizes(), sizes_) &&
               same(tensor_.strides(), strides_);
    }

private:
    Tensor tensor_;
    const void* data_;
    ScalarType type_;
    std::vector<int64_t> sizes_, strides_;
};

using Forward = std::function<Tensor(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights)>;

class Prepared {
public:
    Prepared(const MoeArguments& arguments, const std::vector<OptionalTensor>& tensors, Forward forward)
        : problem_(arguments.problem), dtype_(arguments.dtype), forward_(std::move(forward)) {
        problem_.inference = true;
        for (const OptionalTensor& tensor : tensors) {
            if (tensor) tensors_.emplace_back(*tensor);
        }
    }

    Tensor forward(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights) const {
        if (!holds()) return forward_(hidden_states, topk_ids, topk_weights);
        const profile::Call call("moe_fwd");
        Tokens tokens(Checker("kt::moe_fwd"), hidden_states, topk_ids, topk_weights, problem_);
        if (tokens.dtype != dtype_ || tokens.problem.hidden_size != problem_.hidden_size) {
            return forward_(hidden_states, topk_ids, topk_weights);  // throws an error that names the weight
        }
        tokens.point_to_tokens();
        Tensor output = tokens.empty_output();
        profile::mark("arguments");
        dispatch::current().kernels(dtype_).forward(tokens.problem,
                                                    {output.mutable_data_ptr(), nullptr, nullptr, nullptr});
        return output;
    }

private:
    bool holds() const {
        for (const Snapshot& tensor : tensors_) {
            if (!tensor.holds()) return false;
        }
        return true;
    }

    Problem problem_;
    DType dtype_;
    std::vector<Snapshot> tensors_;
    Forward forward_;  // kt::moe_fwd with all of its arguments
};

class Registry {
public:
    // Never destroyed: threads may outlive static objects. A child process gets it unlocked.
    static Registry& instance() {
        static Registry* const registry = [] {
            pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                           [] { instance().mutex_.unlock(); });
            return new Registry;
        }();
        return *registry;
    }

    int64_t add(std::shared_ptr<const Prepared> prepared) {
        const std::lock_guard<std::mutex> lock(mutex_);
        prepared_.emplace(++last_, std::move(prepared));
        return last_;
    }

    std::shared_ptr<const Prepared> find(int64_t experts) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = prepared_.find(experts);
        if (found == prepared_.end()) Checker("kt::moe_fwd_prepared").fail("experts must come from kt::prepare_moe");
        return found->second;
    }

    void remove(int64_t experts) {
        std::shared_ptr<const Prepared> released;  // destroyed without the lock, because tensors may need Python's
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = prepared_.find(experts);
        if (found == prepared_.end()) return;
        released = std::move(found->second);
        prepared_.erase(found);
    }

private:
    std::mutex mutex_;
    std::unordered_map<int64_t, std::shared_ptr<const Prepared>> prepared_;
    int64_t last_ = 0;
};

}  // namespace

int64_t prepare_moe(KT_MOE_ARGUMENTS(KT_PARAMETER)) {
    const MoeArguments arguments("kt::moe_fwd", KT_MOE_ARGUMENTS(KT_NAME));
    const std::vector<OptionalTensor> tensors = {gate_up_proj,   down_proj,      gate_up_scale, gate_up_zero,
                                                 down_scale,     down_zero,      gate_up_bias,  down_bias,
                                                 gate_up_lora_A, gate_up_lora_B, down_lora_A,   down_lora_B};
    auto forward = [=](Tensor hidden_states, Tensor topk_ids, Tensor topk_weights) {
        return moe_fwd(KT_MOE_ARGUMENTS(KT_NAME));
    };
    return Registry::instance().add(std::make_shared<const Prepared>(arguments, tensors, std::move(forward)));
}

Tensor moe_fwd_prepared(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int64_t experts) {
    return Registry::instance().find(experts)->forward(hidden_states, topk_ids, topk_weights);
}

void release_moe(int64_t experts) { Registry::instance().remove(experts); }

}  // namespace kt::ops
