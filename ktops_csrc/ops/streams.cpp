// kt::moe_fwd in the order of a CUDA stream, and what its calls keep.

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dispatch/table.h"
#include "ops/moe_arguments.h"
#include "streams/calls.h"

namespace kt::ops {
namespace {

using streams::Calls;

// Another tensor with the same memory, which it keeps even if the given one gets other memory (weight.data = ...).
// Python does not know it, so that any thread may destroy it.
Tensor alias(const Tensor& tensor) {
    AtenTensorHandle handle = nullptr;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(), strides.data(), 0, &handle));
    return Tensor(handle);
}

class MoeForward : public streams::Work {
public:
    MoeForward(const MoeArguments& arguments, const std::vector<OptionalTensor>& experts, void* output)
        : problem_(arguments.problem), dtype_(arguments.dtype), output_(output) {
        problem_.inference = true;
        for (const OptionalTensor& tensor : experts) {
            if (tensor) experts_.push_back(alias(*tensor));
        }
    }

    void run() override {
        const profile::Call call("moe_fwd");
        dispatch::current().kernels(dtype_).forward(problem_, {output_, nullptr, nullptr, nullptr});
    }

private:
    Problem problem_;
    DType dtype_;
    void* output_;
    std::vector<Tensor> experts_;  // the memory that the problem points to
};

Calls& loaded(const char* op) {
    if (Calls* calls = Calls::current()) return *calls;
    Checker(op).fail("kt::load_cuda must be called first");
}

// A tensor on the device, and where its copy in a block of pinned memory begins.
class Staged {
public:
    Staged(const char* name, Tensor tensor, size_t begin) : tensor_(std::move(tensor)), begin_(begin) {
        Checker("kt::moe_fwd_begin").require(tensor_.is_contiguous(), name, " must be contiguous");
    }

    // Where the next array may begin.
    size_t end() const { return (begin_ + bytes_of(tensor_) + 63) / 64 * 64; }

    Tensor copy(const streams::Block& block) const {
        return torch::stable::from_blob(block.data() + begin_, tensor_.sizes(), tensor_.strides(),
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                        tensor_.scalar_type());
    }
    streams::Input input(const streams::Block& block) const {
        return {block.data() + begin_, tensor_.const_data_ptr(), bytes_of(tensor_)};
    }

private:
    Tensor tensor_;
    size_t begin_;
};

}  // namespace

int64_t moe_fwd_begin(KT_MOE_ARGUMENTS(KT_PARAMETER), int64_t stream) {
    Calls& calls = loaded("kt::moe_fwd_begin");
    calls.settle();
    const Staged x("hidden_states", hidden_states, 0), ids("topk_ids", topk_ids, x.end()),
        weights("topk_weights", topk_weights, ids.end());
    // For arguments of other shapes, MoeArguments raises the error.
    const int64_t rows = reduce || topk_ids.dim() != 2 ? 1 : topk_ids.size(1);
    const size_t result_bytes = bytes_of(hidden_states) * static_cast<size_t>(rows);
    streams::Block block = calls.stage(reinterpret_cast<streams::Stream>(stream), weights.end() + result_bytes);
    hidden_states = x.copy(block);
    topk_ids = ids.copy(block);
    topk_weights = weights.copy(block);
    const streams::Result result{block.data() + weights.end(), result_bytes};
    const MoeArguments arguments("kt::moe_fwd", KT_MOE_ARGUMENTS(KT_NAME));
    const std::vector<OptionalTensor> experts = {gate_up_proj,   down_proj,      gate_up_scale, gate_up_zero,
                                                 down_scale,     down_zero,      gate_up_bias,  down_bias,
                                                 gate_up_lora_A, gate_up_lora_B, down_lora_A,   down_lora_B};
    auto work = std::make_unique<MoeForward>(arguments, experts, result.host);
    const auto inputs = {x.input(block), ids.input(block), weights.input(block)};
    return calls.begin(std::move(block), inputs, result, std::move(work),
                       static_cast<int>(torch::stable::get_num_threads()));
}

void moe_fwd_end(int64_t call, OptionalTensor output) {
    Calls& calls = loaded("kt::moe_fwd_end");
    if (!output) return calls.abandon(call);
    calls.settle();
    Checker("kt::moe_fwd_end").require(output->is_contiguous(), "output must be contiguous");
    calls.end(call, output->mutable_data_ptr(), bytes_of(*output));
}

void load_cuda(std::string path) { Calls::load(path); }

void synchronize_streams() {
    if (Calls* calls = Calls::current()) calls->synchronize();
}

void stop_streams() {
    if (Calls* calls = Calls::current()) calls->stop();
}

void empty_stream_cache() {
    if (Calls* calls = Calls::current()) calls->release();
}

int64_t staged_bytes() {
    const Calls* calls = Calls::current();
    return calls ? static_cast<int64_t>(calls->staged_bytes()) : 0;
}

}  // namespace kt::ops
