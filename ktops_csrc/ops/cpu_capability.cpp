#include "dispatch/table.h"
#include "isa/sum_words.h"
#include "ops/checks.h"

namespace kt::ops {
namespace {

// Calls f and prefixes the message of its error with the op's name.
template <class F>
decltype(auto) named(const char* op, F f) {
    try {
        return f();
    } catch (const std::runtime_error& error) {
        Checker(op).fail(error.what());
    }
}

}  // namespace

std::string cpu_capability() {
    return named("kt::cpu_capability", [] { return std::string(dispatch::current().name); });
}

std::string cpu_capabilities() { return dispatch::describe(); }

std::string cpu_refusals() { return dispatch::refused(); }

void set_cpu_capability(std::string name) {
    named("kt::set_cpu_capability", [&] { dispatch::use(name); });
}

double measure_peak(std::string isa, std::string dtype, int64_t iterations, bool from_l2) {
    const Checker check("kt::measure_peak");
    check.require(dtype == "bfloat16" || dtype == "float32" || dtype == "int8",
                  "dtype must be one of bfloat16, float32, int8, got '", dtype, "'");
    check.require(!from_l2 || dtype != "int8", "dtype must be bfloat16 or float32 if from_l2 is set, got '", dtype,
                  "'");
    check.require(iterations > 0, "iterations must be positive, got ", iterations);
    const IsaRow& row = named("kt::measure_peak", [&]() -> const IsaRow& { return dispatch::find(isa, "isa"); });
    if (dtype == "int8") return row.peak_int8(iterations);
    const MoeKernels& kernels = row.kernels(dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat32);
    return from_l2 ? kernels.peak_from_l2(iterations) : kernels.peak(iterations);
}

int64_t sum_words(Tensor words) {
    const Checker check("kt::sum_words");
    check.shape("words", words, {{"num_words"}});
    check.int64("words", words);
    check.require(words.is_contiguous(), "words must be contiguous, got stride ", words.stride(0));
    return static_cast<int64_t>(kt::sum_words(static_cast<const uint64_t*>(words.const_data_ptr()), words.numel()));
}

}  // namespace kt::ops
