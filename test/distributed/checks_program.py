"""Checks in two processes, each a function of this file; saves the error of each that fails.

torchrun --nproc-per-node 2 checks_program.py MODEL OUTPUT
"""

import sys
import traceback
import warnings
from pathlib import Path

import torch
from cells import OPERATIONS, Cell, lora_config
from peft import PeftModel, get_peft_model
from tiny_models import NUM_EXPERTS, tiny_batch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from training_program import join, leave, load, rank, whole
from transformers import AutoModelForCausalLM

import ktops
from ktops.formats import ExpertWeight
from ktops.integrations.sharded_experts import sharding_of
from ktops.testing.budgets import model_budget, relative_error

BUDGET = model_budget(torch.float32, 32, OPERATIONS)


def divided(path: str, configuration: str, weights: str = "float32", adapter: bool = True):
    """Returns a model whose experts are divided, with the adapter "lora"."""
    model = load(path, Cell(configuration, "lora", weights), parallel=True)
    return PeftModel.from_pretrained(model, f"{path}/lora", is_trainable=True) if adapter else model


def undivided(path: str, adapter: bool = True):
    """Returns the same model in this process, without ktops."""
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    return PeftModel.from_pretrained(model, f"{path}/lora", is_trainable=True) if adapter else model


def experts_of(model) -> torch.nn.Module:
    """Returns PEFT's wrapper of the experts of the first layer."""
    return model.get_base_model().model.layers[0].mlp.experts


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def require_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = relative_error(actual[name], tensor)
        assert error <= BUDGET, f"{name}: {error:.2e}"


def check_uneven_tokens(path: str) -> None:
    """The first rank has seven tokens, the second none, and two experts, one of each rank, are not chosen."""
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(2, 7, 32, generator=generator)
    ids = torch.tensor([[0, 1, 6], [6, 1, 2], [2, 5, 7], [0, 2, 5], [7, 6, 1], [5, 0, 2], [1, 2, 0]])
    weights = torch.rand(7, 3, generator=generator)
    results = []
    for model, rows in (
        (undivided(path), slice(7)),
        (divided(path, "ep2_all_to_all"), slice(7 if rank() == 0 else 0)),
    ):
        part, routing = x[rows].clone().requires_grad_(), weights[rows].clone().requires_grad_()
        experts = experts_of(model)
        output = experts(part, ids[rows], routing)
        (output * factor[rows]).sum().backward()
        results.append((output, part.grad, routing.grad, gradients(experts)))
    (expected, *others), (actual, *divided_others) = results
    if rank() == 0:
        for tensor, reference in zip((actual, *divided_others[:2]), (expected, *others[:2]), strict=True):
            assert relative_error(tensor, reference) <= BUDGET
    else:
        assert actual.shape == (0, 32)
    mean = {name: gradient / 2 for name, gradient in others[2].items()}
    require_close(divided_others[2], mean)
    lora_a = next(gradient for name, gradient in mean.items() if "lora_A" in name)
    assert not lora_a.reshape(NUM_EXPERTS, -1)[[3, 4]].any()


def check_generation(path: str) -> None:
    """Ranks that share a batch decode what one process decodes; so do those that exchange tokens."""
    prompt = tiny_batch()["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = undivided(path).eval().generate(input_ids=prompt, **options)
    for configuration in ("ep2_all_reduce", "ep2_all_to_all"):
        assert torch.equal(
            divided(path, configuration).eval().generate(input_ids=prompt, **options), expected
        )


def check_gradient_checkpointing(path: str) -> None:
    """Recomputes the experts or keeps what they save, with the gradients of no checkpointing."""
    results = []
    for options in (None, {}, {"context_fn": ktops.checkpoint_context_fn}):
        model = divided(path, "ep2_all_to_all", "int4")
        model.train()
        if options is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False, **options})
            model.enable_input_require_grads()
        model(**tiny_batch()).loss.backward()
        results.append(gradients(model))
    for recomputed in results[1:]:
        require_close(recomputed, results[0])


def check_adapters(path: str) -> None:
    """Adapters are added, switched, disabled and deleted as in one process."""
    models = [undivided(path), divided(path, "ep2_all_to_all")]
    logits: list[list[Tensor]] = [[], []]
    for model, found in zip(models, logits, strict=True):
        model.load_adapter(f"{path}/lora", "other", low_cpu_mem_usage=True)
        for name in ("other", "default"):
            model.set_adapter(name)
            with torch.no_grad():
                for parameter in (p for n, p in model.named_parameters() if f"lora_B.{name}" in n):
                    parameter.mul_(2 if name == "other" else 1)
                found.append(model(**tiny_batch()).logits)
        with torch.no_grad(), model.disable_adapter():
            found.append(model(**tiny_batch()).logits)
        model.delete_adapter("other")
        with torch.no_grad():
            found.append(model(**tiny_batch()).logits)
    for actual, expected in zip(logits[1], logits[0], strict=True):
        assert relative_error(actual, expected) <= BUDGET


def check_new_adapter(path: str) -> None:
    """Ranks with other random numbers begin with one adapter: that of the first rank."""
    model = divided(path, "ep2_all_to_all", adapter=False)
    alone = undivided(path, adapter=False)
    config = lora_config(alone)
    torch.manual_seed(rank())
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    alone = get_peft_model(alone, config)
    for name in ("lora_A", "lora_B"):
        factors = (getattr(experts_of(m), name)["default"].weight for m in (model, alone))
        assert torch.equal(*map(whole, factors))


def check_parts(path: str) -> None:
    """Each rank holds half of the experts and of their adapters: bytes, and which experts."""
    for weights in ("float32", "int4"):
        model = divided(path, "ep2_all_to_all", weights)
        wrapper = experts_of(model)
        base = wrapper.get_base_layer()
        sharding = sharding_of(base)
        assert sharding is not None and sharding.local_experts == range(4 * rank(), 4 * rank() + 4)
        alone = load(path, Cell("ddp2", "lora", weights), parallel=False).model.layers[0].mlp.experts
        assert 2 * held_bytes(base) == held_bytes(alone)
        for factors in (wrapper.lora_A, wrapper.lora_B):
            factor = factors["default"].weight
            assert 2 * factor.to_local().numel() == factor.numel()


def held_bytes(experts: torch.nn.Module) -> int:
    """Returns the bytes of weights in this process."""
    return sum(tensor.nbytes for tensor in map(local, (*experts.parameters(), *experts.buffers())))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_refusals(path: str) -> None:
    """What would be wrong is an error that says what to do; the model stays as it was."""
    model = divided(path, "ep2_all_to_all")
    before = {name: whole(p) for name, p in model.named_parameters()}
    refuses(model.merge_adapter, NotImplementedError, "while the experts are divided among processes")
    refuses(model.merge_and_unload, NotImplementedError, "while the experts are divided among processes")
    assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    reason = "its weights are sharded among processes"
    for configuration in ("tp2", "fsdp2", "ep2_all_to_all"):
        base = divided(path, configuration, adapter=False)
        refuses(lambda base=base: ktops.quantize_experts(base, "int4"), ValueError, reason)
        refuses(lambda base=base: ktops.load_experts(base, path), ValueError, reason)
        with warnings.catch_warnings(record=True) as caught:
            ktops.swap_experts(base)
        assert any(reason in str(warning.message) for warning in caught)
    quantized = divided(path, "ep2_all_to_all", "int4", adapter=False)
    refuses(lambda: quantized.save_pretrained("/nonexistent"), ValueError, "not serializable")


def refuses(call, kind: type[Exception], message: str) -> None:
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def check_data_parallel(path: str) -> None:
    """DistributedDataParallel sends no experts in formats: not when it is created, and not in forward."""
    model = load(path, Cell("ddp2", "lora", "int4"), parallel=True)
    model = PeftModel.from_pretrained(model, f"{path}/lora", is_trainable=True)
    weights = [module for module in model.modules() if isinstance(module, ExpertWeight)]
    assert len(weights) == 4
    if rank() == 1:
        for weight in weights:
            weight.weight.zero_()  # what rank 0 has would replace it
    parallel = DistributedDataParallel(model)
    parallel(**tiny_batch()).loss.backward()
    assert all(bool(weight.weight.any()) == (rank() == 0) for weight in weights)


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


def main(path: str, directory: str) -> None:
    join()
    for name in CHECKS:
        torch.manual_seed(0)
        error = None
        try:
            globals()[name](path)
        except Exception:
            error = traceback.format_exc()
        errors: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(errors, error)
        if rank() == 0:
            text = "\n".join(f"rank {number}: {error}" for number, error in enumerate(errors) if error)
            (Path(directory) / name).write_text(text)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
