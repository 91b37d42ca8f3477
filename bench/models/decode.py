"""Compares what a token of an answer takes with and without an adapter, and with linear layers in int8.

Example:
    python -m bench.models make --like deepseek-v2-lite --layers 4 MODEL
    ktops convert MODEL INT4 --format int4
    python -m bench.models decode INT4 --tokens 512

The adapter has random factors, on attention and experts. It runs as PEFT's modules, and frozen, as `ktops
chat` runs it. The models are loaded side by side and take turns with the same tokens. Times are medians of
the CPU time of one thread, so that other processes on the machine matter little.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import ktops
from bench.arguments import Parser, lora_rank, positive
from bench.contest import ContestError
from ktops.cli import inference
from ktops.cli.chat.conversation import CACHE
from ktops.cli.finetune.lora import targets
from ktops.cli.inference import LoadOptions
from ktops.cli.models import load_base, quantize_linear
from ktops.nn.find import find_experts, without_base_layer

LINEAR_FORMATS = (None, "int8")
ADAPTERS = ("none", "PEFT", "frozen")
_WARM_UP, _STEPS = 2, 6


def random_adapter(folder: Path, rank: int, out: Path) -> None:
    """Writes an adapter on attention and experts, as `ktops finetune` would, with random factors."""
    from peft import LoraConfig, get_peft_model

    model, _ = load_base(str(folder), torch.bfloat16, LoadOptions(str(folder)))
    found, _ = targets(model, "attention,experts")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=found.modules, target_parameters=found.parameters
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)


def load(folder: Path, adapter: Path, kind: str, linear_format: str | None) -> nn.Module:
    """Loads a model in evaluation mode, with the adapter as a kind of ADAPTERS."""
    options = LoadOptions(str(folder), adapter=None if kind == "none" else str(adapter))
    options, trained = inference.prepare(options, lambda line: None)
    model, _ = load_base(str(folder), torch.bfloat16, options)
    if trained is not None:
        model = inference.with_adapter(model, trained)
    if kind == "frozen":
        model = ktops.freeze_adapters(model)
    if linear_format is not None:
        quantize_linear(model, linear_format)
    return model.eval()


class Decoder:
    """Decodes with a model, and collects times in milliseconds.

    Attributes:
        tokens: of a step.
        layers: the mean of the layers with experts in a step.
        logits: of the last step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tokens: list[float] = []
        self.layers: list[float] = []
        self._begun: list[float] = []
        self._spent: list[float] = []
        for name in find_experts(model):
            block = model.get_submodule(without_base_layer(name).rpartition(".")[0])
            layer = next(m for m in model.modules() if block in {*m.children()})
            layer.register_forward_pre_hook(lambda *_: self._begun.append(time.process_time()))
            layer.register_forward_hook(lambda *_: self._spent.append(time.process_time() - self._begun[-1]))

    @torch.inference_mode()
    def decode(self, prompt: torch.Tensor) -> None:
        output = self.model(input_ids=prompt, use_cache=True)
        for step in range(_WARM_UP + _STEPS):
            self._spent.clear()
            begun = time.process_time()
            cache = {CACHE: getattr(output, CACHE)}
            output = self.model(input_ids=prompt[:, :1], use_cache=True, **cache)
            if step >= _WARM_UP:
                self.tokens.append(1e3 * (time.process_time() - begun))
                self.layers.append(1e3 * statistics.mean(self._spent))
        self.logits = output.logits


def measure(folder: Path, rank: int, tokens: int, rounds: int) -> dict[tuple[str | None, str], Decoder]:
    """Returns (linear format, kind of adapter) -> times.

    Raises:
        ContestError: the frozen adapter computes something else than PEFT.
    """
    kinds = ADAPTERS if rank else ADAPTERS[:1]
    with tempfile.TemporaryDirectory() as scratch:
        if rank:
            random_adapter(folder, rank, Path(scratch))
        decoders = {
            (linear_format, kind): Decoder(load(folder, Path(scratch), kind, linear_format))
            for linear_format in LINEAR_FORMATS
            for kind in kinds
        }
    prompt = torch.arange(tokens)[None] % 1000
    for _ in range(rounds):
        for decoder in decoders.values():
            decoder.decode(prompt)
    for linear_format in LINEAR_FORMATS if rank else ():
        logits = [decoders[linear_format, kind].logits for kind in ("PEFT", "frozen")]
        if not torch.equal(*logits):
            raise ContestError("the frozen adapter computes other logits than PEFT's modules")
    return decoders


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("models decode", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's directory")
    parser.tokens(64)
    parser.add_argument("--rank", type=lora_rank, default=8, metavar="R", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=6, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    for tokens in args.tokens:
        decoders = measure(args.model, args.rank, tokens, args.rounds)
        print(f"{args.model}, rank {args.rank}, after {tokens} tokens; CPU milliseconds, one thread")
        print(f"{'linear layers':>13} {'adapter':>8} {'token':>8} {'layer':>7}")
        for (linear_format, kind), decoder in decoders.items():
            token, layer = statistics.median(decoder.tokens), statistics.median(decoder.layers)
            print(f"{linear_format or 'bf16':>13} {kind:>8} {token:8.2f} {layer:7.2f}")
    return 0
