"""swap_experts and unswap_experts replace modules; results and Parameters stay the same."""

import pytest
import torch
import transformers
from model_runs import MODEL_BUDGET, CountOps, experts_modules, step, storage_changes
from moe_blocks import (
    E,
    H,
    I,
    InferBlock,
    LoopBlock,
    MixtralMLP,
    TwoLayers,
    UngatedMLP,
)
from tiny_models import tiny_model
from torch import nn

import ktops
from ktops._warn import warn_once
from ktops.nn import KTExpertList, KTExperts, expert_list
from ktops.testing.budgets import forward_budget, relative_error


@pytest.fixture(autouse=True)
def warned_of_nothing():
    warn_once.cache_clear()


NAMES = ["layers.0.experts", "layers.1.experts"]

BLOCKS = {
    "loop": (LoopBlock, {}),
    "mixtral": (LoopBlock, {"expert": MixtralMLP}),
    "bias": (LoopBlock, {"bias": True}),
    "ungated": (LoopBlock, {"expert": UngatedMLP}),
    "moe_infer": (InferBlock, {}),
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def make(kind: str) -> TwoLayers:
    block, options = BLOCKS[kind]
    return TwoLayers(block, **options)


def train_step(model: nn.Module, seed: int = 1):
    """Returns (output, gradients by name, kt operators)."""
    x = torch.randn(3, 5, H, generator=torch.Generator().manual_seed(seed))
    x = x.to(next(model.parameters()).dtype)
    model.zero_grad()
    with CountOps() as ops:
        output = model(x)
        output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), gradients, ops.counts


def assert_same_step(actual, expected):
    assert relative_error(actual[0], expected[0]) < MODEL_BUDGET
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert relative_error(actual[1][name], gradient) < MODEL_BUDGET, name


def test_stacked_experts_swap_and_unswap():
    """The Parameters are the same objects throughout, and training continues to update them."""
    model = tiny_model("qwen3_moe")
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    names = experts_modules(model)
    assert ktops.swap_experts(model, save="recompute") == names
    assert ktops.swap_experts(model) == []
    for name in names:
        assert isinstance(model.get_submodule(name), KTExperts)
        assert model.get_submodule(name).save == "recompute"
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = step(model)
    for name, parameter in model.named_parameters():
        parameter.grad = run.gradients[name]
    optimizer.step()
    trained = step(model)
    model.eval()
    assert ktops.unswap_experts(model) == names
    assert ktops.unswap_experts(model) == []
    for name in names:
        assert model.get_submodule(name) is modules[name]
        assert not model.get_submodule(name).training
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    eager = step(model)
    assert not eager.ops
    assert relative_error(trained.loss, eager.loss) < MODEL_BUDGET
    assert relative_error(run.loss, eager.loss) > 0.01


def test_unswap_after_the_parameters_were_replaced():
    model = tiny_model("mixtral")
    ktops.swap_experts(model)
    other = {name: tensor.double() * 1.25 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    ktops.unswap_experts(model)
    for name, tensor in other.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@every_block
def test_module_list_training_step(kind):
    model, expected = make(kind), train_step(make(kind))
    parameters = dict(model.named_parameters())
    assert ktops.swap_experts(model) == NAMES
    assert list(model.state_dict()) == list(make(kind).state_dict())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    actual = train_step(model)
    assert_same_step(actual, expected)
    assert actual[2]["moe_sft_fwd"] == actual[2]["moe_sft_bwd"] > E
    assert not expected[2]


@every_block
def test_module_list_has_one_copy_of_the_weights(kind):
    """Every weight is a slice of one of two stacked tensors per layer."""
    model = make(kind)
    ktops.swap_experts(model)
    for name in NAMES:
        experts = model.get_submodule(name)
        weights = [parameter for parameter in experts.parameters() if parameter.dim() == 2]
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in weights}
        num_projections = 2 if kind == "ungated" else 3
        assert sum(storage.nbytes() for storage in storages.values()) == num_projections * E * H * I * 4
        assert len(storages) == 2


@every_block
def test_module_list_unswap_after_training(kind):
    model, plain = make(kind), make(kind)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    ktops.swap_experts(model)
    for trained in (model, plain):
        train_step(trained)
        torch.optim.SGD(trained.parameters(), lr=1e-3).step()
    assert ktops.unswap_experts(model) == NAMES
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert "moe_infer" not in model.layers[0].__dict__
    actual, expected = train_step(model), train_step(plain)
    assert_same_step(actual, expected)
    assert not actual[2]
    assert relative_error(expected[0], train_step(make(kind))[0]) > 0.01


def load(model, assign):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=assign)
    return model


def set_data(model):
    weight = model.layers[0].experts[1].gate_proj.weight
    weight.data = weight.data.clone()
    return model


CHANGES = {**storage_changes(load), "data": set_data}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_module_list_stays_right_when(change, mode):
    """A changed weight takes effect; no stale copy is used."""
    model = make("moe_infer")
    ktops.swap_experts(model)
    changed = CHANGES[change](model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.5)
    expected = make("moe_infer")
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(0.5)
    actual = train_step(getattr(changed, mode)())
    assert_same_step_where_given(actual, train_step(getattr(expected, mode)()))
    assert actual[2]


def test_module_list_loaded_in_another_dtype():
    model, expected = make("loop"), make("loop").double()
    ktops.swap_experts(model)
    model.load_state_dict({k: v.double() for k, v in model.state_dict().items()}, assign=True)
    actual = train_step(model)
    assert actual[0].dtype == torch.float64 and actual[2]["moe_sft_fwd"] > E
    assert_same_step(actual, train_step(expected))


def assert_same_step_where_given(actual, expected):
    """In evaluation mode moe_infer gives the experts no gradient."""
    given = {name: gradient for name, gradient in expected[1].items() if gradient is not None}
    assert given and all(actual[1][name] is None for name in expected[1].keys() - given.keys())
    assert_same_step((actual[0], {name: actual[1][name] for name in given}), (expected[0], given))


def test_moe_infer_runs_one_op_per_layer():
    model, expected = make("moe_infer").eval(), make("moe_infer").eval()
    ktops.swap_experts(model)
    x = torch.randn(3, 5, H)
    with torch.no_grad(), CountOps() as ops:
        actual = model(x)
    assert ops.counts == {"moe_fwd": 2}
    assert relative_error(actual, expected(x)) < MODEL_BUDGET


def test_module_list_in_bfloat16():
    model, exact = make("loop").bfloat16(), make("loop").bfloat16().double()
    ktops.swap_experts(model)
    x = torch.randn(3, 5, H).bfloat16()
    layer, exact_layer = model.layers[0], exact.layers[0]
    with CountOps() as ops:
        actual = layer.experts[0](x)
    assert ops.counts == {"moe_sft_fwd": 1}
    assert relative_error(actual, exact_layer.experts[0](x.double())) < forward_budget(torch.bfloat16)


def test_module_list_with_frozen_experts():
    model, plain = make("loop"), make("loop")
    ktops.swap_experts(model)
    for trained in (model, plain):
        trained.layers[1].experts.requires_grad_(False)
        trained.layers[0].experts[2].up_proj.weight.requires_grad_(False)
    assert_same_step_where_given(train_step(model), train_step(plain))


def test_adapters_around_projections_are_not_skipped():
    """A Linear that is wrapped or hooked after the swap is called, with a warning."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    model, plain = make("loop"), make("loop")
    ktops.swap_experts(model)
    for changed in (model, plain):
        expert = changed.layers[0].experts[1]
        expert.up_proj = Adapter(expert.up_proj)
        changed.layers[1].experts[0].gate_proj.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.warns(UserWarning, match="called one by one"):
        actual = train_step(model)
    assert_same_step(actual, train_step(plain))
    with pytest.raises(RuntimeError, match=r"must be plain nn\.Linear"):
        model.layers[0].experts(torch.randn(1, H), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    ktops.unswap_experts(model)
    assert isinstance(model.layers[0].experts[1].up_proj, Adapter)
    assert_same_step(train_step(model), train_step(plain))


def test_dropout_between_projections():
    """While it is active, the projections are called, with a warning; else the op runs."""
    model, plain = (TwoLayers(LoopBlock, expert=UngatedMLP, dropout=0.5) for _ in range(2))
    assert ktops.swap_experts(model) == NAMES
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="have an active dropout between them"):
        actual = train_step(model)
    torch.manual_seed(1)
    assert_same_step(actual, train_step(plain))
    assert not actual[2]
    actual = train_step(model.eval())
    assert_same_step(actual, train_step(plain.eval()))
    assert actual[2]["moe_sft_bwd"] > E


def test_module_list_in_another_dtype_calls_its_projections(monkeypatch):
    monkeypatch.setattr(expert_list, "DTYPES", (torch.float32,))
    model = make("loop")
    ktops.swap_experts(model)
    with pytest.warns(UserWarning, match=r"experts whose projections are torch\.float16"):
        model.half()
    with CountOps() as ops:
        model.layers[0].experts[0](torch.randn(2, H).half())
    assert not ops.counts
    assert isinstance(model.layers[0].experts, KTExpertList)


def test_float16_module_list():
    """Cast before the swap or after it, its experts run in float16."""
    exact, x = make("loop").half().double().layers[0], torch.randn(5, H).half()
    for cast_first in (True, False):
        model = make("loop").half() if cast_first else make("loop")
        assert ktops.swap_experts(model)
        layer = model.half().layers[0]
        with CountOps() as ops:
            output = layer.experts[0](x)
        assert ops.counts and output.dtype == torch.float16
        assert relative_error(output, exact.experts[0](x.double())) < forward_budget(torch.float16)


def test_save_pretrained_of_swapped_lists(tmp_path):
    """The slices are written as separate tensors."""
    config = transformers.PreTrainedConfig()

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.blocks = TwoLayers(LoopBlock)
            self.post_init()

    model = Model(config)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ktops.swap_experts(model)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
