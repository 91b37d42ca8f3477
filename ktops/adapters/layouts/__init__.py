"""The layouts of adapters that other programs load, one module each."""

from ktops.adapters.layouts import kt, peft, per_expert
from ktops.adapters.layouts.plan import Plan, Planner

LAYOUTS: dict[str, Planner] = {
    "peft": peft.plan,
    "vllm": per_expert.for_vllm,
    "sglang": per_expert.for_sglang,
    "llama.cpp": per_expert.for_llama_cpp,
    "kt": kt.plan,
}
"""Maps a program to the function that plans the files for it."""

__all__ = ["LAYOUTS", "Plan"]
