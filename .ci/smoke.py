"""Tests an installed ktops with only its own dependencies, away from the source tree."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import ktops
from ktops import reference
from ktops.testing.budgets import forward_budget
from ktops.testing.inputs import moe_inputs, op_arguments, require_grad, upcast

package = Path(ktops.__file__).resolve().parent
assert Path(sys.prefix).resolve() in package.parents, f"ktops comes from {package}, not from this environment"
assert list(package.glob("_C*.so")), f"no extension module in {package}"
assert (package / "py.typed").is_file()
assert list(package.glob("cli/finetune/data/*")), f"the data of the command line is missing in {package}"
started = "import sys; print('ktops.launcher.startup' in sys.modules, 'torch' in sys.modules)"
environment = {**os.environ, "KTOPS_LAUNCH": "1"}
printed = subprocess.check_output([sys.executable, "-c", started], env=environment, text=True)
assert printed == "True False\n", f"ktops_launch.pth is not installed: {printed}"

for isa, available in ktops.cpu_capabilities().items():
    if not available:
        print(f"{isa}: not on this CPU")
        continue
    inputs = moe_inputs(T=33, H=96, I=40, E=4, K=2, dtype=torch.bfloat16, weights_dtype=torch.float32)
    inputs = require_grad(inputs, "hidden_states")
    with ktops.use_isa(isa):
        y = ktops.moe_sft(**inputs)
        y.sum().backward()
    expected = reference.moe_fwd(op_arguments(upcast(inputs)))
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < forward_budget(torch.bfloat16), f"{isa}: relative error {error}"
    grad = inputs["hidden_states"].grad
    assert grad.isfinite().all()
    assert grad.count_nonzero()
    print(f"{isa}: relative error {error:.2e}")
print(f"ktops {ktops.__version__} works from {package}")
