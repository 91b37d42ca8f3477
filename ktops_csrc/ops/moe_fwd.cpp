#include "dispatch/table.h"
#include "ops/moe_arguments.h"

namespace kt::ops {

Tensor moe_fwd(KT_MOE_ARGUMENTS(KT_PARAMETER)) {
    const profile::Call call("moe_fwd");
    MoeArguments arguments("kt::moe_fwd", KT_MOE_ARGUMENTS(KT_NAME));
    arguments.problem.inference = true;
    Tensor output = arguments.empty_output();
    profile::mark("arguments");
    dispatch::current()
        .kernels(arguments.dtype)
        .forward(arguments.problem, {output.mutable_data_ptr(), nullptr, nullptr, nullptr});
    return output;
}

}  // namespace kt::ops
