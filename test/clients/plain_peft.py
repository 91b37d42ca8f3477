"""Loads an adapter: python plain_peft.py MODEL ADAPTER OUT [ktops]

Writes to OUT/logits.safetensors what a model computes without the adapter, with it, with it disabled, with it
merged, and after saving and loading the merged model. Uses ktops only if told to.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(base: str, adapter: str, out: str, experts: str = "eager") -> None:
    if experts == "ktops":
        import ktops

        ktops.enable()

    def load(path: str | Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation=experts
        ).eval()

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=ids).logits.clone()

    model = load(base)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    results = {"base": logits(model)}
    model = PeftModel.from_pretrained(model, adapter).eval()
    results["adapted"] = logits(model)
    with model.disable_adapter():
        results["disabled"] = logits(model)
    merged = model.merge_and_unload()
    results["merged"] = logits(merged)
    merged.save_pretrained(Path(out) / "merged")
    results["reloaded"] = logits(load(Path(out) / "merged"))
    save_file(results, Path(out) / "logits.safetensors")


main(*sys.argv[1:])
