"""In inference, experts with LoRA pass only the tokens; factors that change in between are noticed."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_experts import E, H, I, T, make, tokens
from torch import nn

import ktops
from ktops.nn import KTExperts
from ktops.nn.prepared import PREPARED, forward_prepared
from ktops.testing.counts import counted

RANK = 3

ONLY_TOKENS = "kt::moe_fwd_prepared"


@pytest.fixture(autouse=True)
def enabled():
    ktops.enable()
    yield
    ktops.disable()


def factors(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "gate_up_lora_A": (E, RANK, H),
        "gate_up_lora_B": (E, 2 * I, RANK),
        "down_lora_A": (E, RANK, I),
        "down_lora_B": (E, H, RANK),
    }
    lora = {name: torch.randn(shape, generator=generator).to(dtype) / 8 for name, shape in shapes.items()}
    return {**lora, "gate_up_scaling": 2.0, "down_scaling": 0.5}


def operators(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
    """Returns the result of a call, and the kt operators that it ran."""
    with counted() as counts:
        output = call()
    return output, [name for name in counts.operators if name.startswith("kt::moe")]


def general(run: Callable[..., torch.Tensor], *inputs, **lora) -> torch.Tensor:
    """Runs the operator that takes all arguments: with gradients on, nothing is prepared."""
    with torch.enable_grad():
        output, names = operators(lambda: run(*inputs, **lora).detach())
    assert ONLY_TOKENS not in names and names
    return output


def assert_prepared(run: Callable[..., torch.Tensor], *inputs, **lora) -> torch.Tensor:
    """Runs experts twice in inference: the second call passes only the tokens, and both are exact."""
    expected = general(run, *inputs, **lora)
    with torch.no_grad():
        first = run(*inputs, **lora)
        second, names = operators(lambda: run(*inputs, **lora))
    assert names == [ONLY_TOKENS]
    assert torch.equal(first, expected) and torch.equal(second, expected)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", [None, "int4"])
def test_same_bits(weight_format, dtype):
    experts, lora = make(weight_format), factors(dtype)
    experts.compute = "bf16"
    for number in (1, T, 40):
        with_lora = assert_prepared(experts, *tokens(number), **lora)
        one = {name: value for name, value in lora.items() if name.startswith("down")}
        with_one = assert_prepared(experts, *tokens(number), **one)
        without = assert_prepared(experts, *tokens(number))
        assert len({tuple(result.flatten().tolist()) for result in (with_lora, with_one, without)}) == 3


@pytest.mark.parametrize("change", ["values", "data", "tensor", "strides", "scaling", "dtype"])
def test_factors_that_change(change):
    experts, inputs, lora = make(), tokens(), factors()
    before = assert_prepared(experts, *inputs, **lora)
    a = lora["gate_up_lora_A"]
    if change == "values":
        a.mul_(3)
    elif change == "data":
        a.data = a.clone().mul_(3)
    elif change == "tensor":
        lora["gate_up_lora_A"] = a * 3
    elif change == "strides":
        lora["gate_up_lora_A"] = a.view(E, H, RANK).mT
    elif change == "scaling":
        lora["gate_up_scaling"] = 6.0
    else:
        lora["gate_up_lora_A"] = a.to(torch.float16).mul_(3)
    after = assert_prepared(experts, *inputs, **lora)
    assert not torch.equal(before, after)


def test_memory_of_factors_is_not_mistaken_for_that_of_others():
    """New factors may not lie where released ones lay, as long as these are what the operator reads."""
    experts, inputs = make(), tokens()
    for number in range(20):
        lora = {name: value * number if "lora" in name else value for name, value in factors().items()}
        assert_prepared(experts, *inputs, **lora)


class Subclass(torch.Tensor):
    pass


def test_factors_that_may_be_elsewhere_take_the_general_path():
    experts, inputs, lora = make(), tokens(), factors()
    expected = general(experts, *inputs, **lora)
    lora["down_lora_A"] = lora["down_lora_A"].as_subclass(Subclass)
    with torch.no_grad():
        assert forward_prepared(experts, *inputs, lora) is None
        assert torch.equal(experts(*inputs, **lora), expected)


def test_errors_are_those_of_the_operator():
    experts, inputs, lora = make(), tokens(), factors()
    with torch.no_grad():
        experts(*inputs, **lora)
        with pytest.raises(RuntimeError, match=r"kt::moe_fwd: gate_up_lora_A must be given together with"):
            experts(*inputs, **{**lora, "gate_up_lora_A": None})
        with pytest.raises(RuntimeError, match=r"kt::moe_fwd: down_scaling must be finite"):
            experts(*inputs, **{**lora, "down_scaling": float("nan")})
        with pytest.raises(RuntimeError, match=r"down_lora_B must be on cpu, got meta"):
            experts(*inputs, **{**lora, "down_lora_B": lora["down_lora_B"].to("meta")})


class Layer(nn.Module):
    def __init__(self, experts: KTExperts) -> None:
        super().__init__()
        self.experts = experts
        self.other = nn.Parameter(torch.zeros(1))  # PEFT asks for the device of a parameter

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(*inputs)


def with_adapters(*names: str, weight_format: str | None = None) -> PeftModel:
    """Returns a layer with PEFT adapters, random and different, the first of them active."""
    config = LoraConfig(
        r=RANK, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(Layer(make(weight_format)), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def experts_of(model: PeftModel) -> KTExperts:
    return next(module for module in model.modules() if isinstance(module, KTExperts))


@pytest.mark.parametrize("weight_format", [None, "int4"])
def test_adapters_of_peft(weight_format):
    model, inputs = with_adapters("one", "two", weight_format=weight_format), tokens()
    experts_of(model).compute = "bf16"
    one = assert_prepared(model, *inputs)
    model.set_adapter("two")
    two = assert_prepared(model, *inputs)
    with model.disable_adapter():
        without = assert_prepared(model, *inputs)
    assert torch.equal(without, assert_prepared(experts_of(model), *inputs))
    model.set_adapter("one")
    assert torch.equal(assert_prepared(model, *inputs), one)
    for each, other in ((one, two), (one, without), (two, without)):
        assert not torch.equal(each, other)


def test_factors_of_peft_that_are_set_in_place():
    model, inputs = with_adapters("one"), tokens()
    before = assert_prepared(model, *inputs)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2)
    doubled = assert_prepared(model, *inputs)
    assert not torch.equal(doubled, before)
    state = {name: tensor * 3 for name, tensor in model.state_dict().items() if "lora_B" in name}
    model.load_state_dict(state, strict=False)
    assert not torch.equal(assert_prepared(model, *inputs), doubled)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0)
    assert torch.equal(assert_prepared(model, *inputs), assert_prepared(experts_of(model), *inputs))


def test_merged_adapters():
    model, inputs = with_adapters("one"), tokens()
    unmerged = assert_prepared(model, *inputs)
    model.merge_adapter()
    merged = assert_prepared(model, *inputs)
    assert torch.equal(merged, assert_prepared(experts_of(model), *inputs))
    assert not torch.equal(merged, unmerged)
    model.unmerge_adapter()
    assert not torch.equal(assert_prepared(model, *inputs), merged)


@pytest.mark.parametrize("fused", [False, True])
def test_training_between_inferences(fused):
    model, inputs = with_adapters("one", weight_format="int4"), tokens()
    experts_of(model).compute = "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    results = []
    for _ in range(3):
        results.append(assert_prepared(model.eval(), *inputs))
        model.train()
        loss = model(*inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_adapters_that_are_deleted_are_released():
    model, inputs = with_adapters("one", "two"), tokens()
    assert_prepared(model, *inputs)
    held = getattr(experts_of(model), PREPARED).experts
    model.delete_adapter("one")
    model.set_adapter("two")
    assert_prepared(model, *inputs)
    with pytest.raises(RuntimeError, match="experts must come from"):
        torch.ops.kt.moe_fwd_prepared(*inputs, held)
