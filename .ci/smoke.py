"""An installed ktops, with nothing but its own dependencies, away from the source tree."""

import sys
from pathlib import Path

import torch

import ktops
from ktops import reference
from ktops.testing.budgets import forward_budget

package = Path(ktops.__file__).resolve().parent
assert Path(sys.prefix).resolve() in package.parents, f"ktops comes from {package}, not from this environment"
assert list(package.glob("_C*.so")), f"no extension module in {package}"
assert (package / "py.typed").is_file()
assert list(package.glob("cli/data/*")), f"the data of the command line is missing in {package}"

num_tokens, top_k, num_experts, hidden_size, intermediate_size = 33, 2, 4, 96, 40
for isa, available in ktops.cpu_capabilities().items():
    if not available:
        print(f"{isa}: not on this CPU")
        continue
    x = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weights, ids = torch.randn(num_tokens, num_experts).softmax(dim=1).topk(top_k)
    gate_up_proj = torch.randn(num_experts, 2 * intermediate_size, hidden_size) / hidden_size**0.5
    down_proj = torch.randn(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5
    gate_up_proj, down_proj = gate_up_proj.bfloat16(), down_proj.bfloat16()
    with ktops.use_isa(isa):
        y = ktops.moe_sft(x, ids, weights, gate_up_proj, down_proj)
        y.sum().backward()
    tensors = [t.detach().double() for t in (x, weights, gate_up_proj, down_proj)]
    tensors.insert(1, ids)
    attributes = (num_experts, intermediate_size, "dense", 0, "auto", 1.0, 1.0, "silu", [])
    expected = reference.moe_fwd(*tensors, *[None] * 10, *attributes)
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < forward_budget(torch.bfloat16), f"{isa}: relative error {error}"
    assert x.grad.isfinite().all()
    assert x.grad.count_nonzero()
    print(f"{isa}: relative error {error:.2e}")
print(f"ktops {ktops.__version__} works from {package}")
