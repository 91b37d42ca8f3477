"""swap_experts on models of transformers whose experts are outside its experts interface."""

import re
from importlib.util import find_spec

import pytest
import torch
from every_model import tiny_batch, tiny_model
from every_model_runs import step
from model_runs import MODEL_BUDGET, CountOps, assert_close, storage_changes
from model_support import SWAPPED
from peft import LoraConfig, get_peft_model
from peft_models import Recorder, assert_as_close, loss_and_gradients, randomize
from safetensors.torch import load_file
from torch import nn

import ktops
from ktops._warn import warn_once
from ktops.integrations.peft import expert_target_parameters
from ktops.integrations.transformers.outside import is_replacement
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

FOLDERS = sorted(folder for folder in SWAPPED if find_spec(f"transformers.models.{folder}"))
IN_EXPERTS = re.compile(r"experts|linear")
every_folder = pytest.mark.parametrize("folder", FOLDERS)


@pytest.fixture(autouse=True)
def warned_of_nothing():
    warn_once.cache_clear()


@pytest.fixture
def no_peft():
    """Restores PEFT's own methods, which swap_experts replaces."""
    yield
    ktops.disable()


def swapped(folder: str, **overrides) -> nn.Module:
    model = tiny_model(folder, **overrides)
    assert ktops.swap_experts(model)
    return model


def replacements(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_replacement(module)]


def logits(model: nn.Module, folder: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(folder)).logits


def nbytes(model: nn.Module) -> int:
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@every_folder
def test_parameters_and_keys_stay(folder):
    """Through swap and unswap, Parameters, keys and values are the same, and there is one copy of them."""
    model = tiny_model(folder)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    size = nbytes(model)
    names = ktops.swap_experts(model)
    assert len(replacements(model)) == len(names) > 0
    assert ktops.swap_experts(model) == []

    def assert_unchanged():
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert model.state_dict().keys() == values.keys()
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert nbytes(model) == size

    assert_unchanged()
    assert ktops.unswap_experts(model) == names
    assert_unchanged()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert not step(model, folder).ops


@every_folder
def test_save_pretrained(folder, tmp_path):
    """A swapped model writes the same files, which load in the original."""
    plain = tiny_model(folder)
    plain.save_pretrained(tmp_path / "plain")
    model = swapped(folder)
    model.save_pretrained(tmp_path / "swapped")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "swapped")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[1][name], tensor) for name, tensor in files[0].items())
    loaded = type(model).from_pretrained(tmp_path / "swapped")
    assert relative_error(logits(model.eval(), folder), logits(loaded, folder)) < MODEL_BUDGET


def load(model: nn.Module, assign: bool) -> nn.Module:
    state = {name: weight.clone() for name, weight in model.state_dict().items() if IN_EXPERTS.search(name)}
    model.load_state_dict(state, strict=False, assign=assign)
    return model


CHANGES = storage_changes(load)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("folder", ["dbrx", "jetmoe", "longcat_flash", "switch_transformers"])
def test_training_after(change, folder):
    """The weights that a model has then are those that the op reads and whose gradients it computes."""
    model, eager, exact = (tiny_model(folder, dtype) for dtype in (*[torch.float32] * 2, torch.float64))
    assert ktops.swap_experts(model)
    model = CHANGES[change](model)
    for each in (model, eager, exact):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if IN_EXPERTS.search(name):
                    parameter.mul_(0.75)
    actual = step(model, folder)
    assert actual.ops["moe_sft_bwd"]
    assert_close(actual, step(eager, folder), step(exact, folder))


DROPOUTS = {"switch_transformers": "dropout_rate", "nllb_moe": "activation_dropout"}


@pytest.mark.parametrize("folder", DROPOUTS)
def test_dropout_between_the_products(folder):
    """In training the experts run without the op, with a warning; in evaluation mode with it."""
    options = {DROPOUTS[folder]: 0.5}
    eager, model = tiny_model(folder, **options), swapped(folder, **options)
    with CountOps() as ops, pytest.warns(UserWarning, match="have an active dropout between them"):
        torch.manual_seed(1)
        actual = logits(model, folder)
    assert not ops.counts
    torch.manual_seed(1)
    same = relative_error(actual, logits(eager, folder)) < MODEL_BUDGET
    assert same == (folder != "nllb_moe")  # which also drops outputs that have no weight
    with CountOps() as ops:
        actual = logits(model.eval(), folder)
    assert ops.counts
    assert relative_error(actual, logits(eager.eval(), folder)) < MODEL_BUDGET


def test_token_dropout_of_nllb():
    """In training, whole outputs are dropped element by element; in evaluation mode they are scaled."""
    eager, model = (tiny_model("nllb_moe", moe_token_dropout=0.25) for _ in range(2))
    assert ktops.swap_experts(model)
    name = "model.encoder.layers.1.ffn.experts"
    experts = model.get_submodule(name)
    x, weights = torch.randn(50, 32), torch.rand(50, 1)
    probs = nn.functional.pad(weights, (0, 5))
    mask = probs.bool().long()
    arguments = x, mask, probs
    expected = eager.get_submodule(name).eval()(*arguments)
    assert relative_error(experts.eval()(*arguments), expected) < MODEL_BUDGET
    with CountOps() as ops:
        output = experts.train()(*arguments)
    assert ops.counts["moe_sft_fwd"] == 1
    dropped = output == 0
    assert 0.2 < dropped.float().mean() < 0.3
    full = torch.where(dropped, 0, expected / 0.75**2)
    assert relative_error(output, full) < MODEL_BUDGET


def test_weights_of_dbrx_are_read_in_place():
    """Also after they were cast, which separates the rows of w1 and v1."""
    experts = next(filter(is_replacement, swapped("dbrx").modules()))
    for each in (experts, experts.double()):
        for weight, parameter in zip(each.weights(), (each.mlp.w1, each.mlp.w2), strict=True):
            assert weight.data_ptr() == parameter.data_ptr() and weight.dtype == parameter.dtype


@pytest.mark.parametrize("folder", ["dbrx", "jetmoe", "longcat_flash", "switch_transformers"])
@torch.no_grad()
def test_functional_call(folder):
    """The op reads the given tensors, and later the Parameters again."""
    model, eager = swapped(folder).eval(), tiny_model(folder).eval()
    before = logits(model, folder)
    given = {name: 1.5 * parameter for name, parameter in model.named_parameters()}
    actual = torch.func.functional_call(model, given, kwargs=tiny_batch(folder)).logits
    expected = torch.func.functional_call(eager, given, kwargs=tiny_batch(folder)).logits
    assert relative_error(actual, expected) < MODEL_BUDGET
    assert torch.equal(logits(model, folder), before)


def test_tokens_over_the_capacity_of_switch():
    """Their row of the mask is 0, and so is their output."""
    eager, model = tiny_model("switch_transformers"), swapped("switch_transformers")
    [name, *_] = [name for name, module in model.named_modules() if is_replacement(module)]
    x, weights = torch.randn(6, 32), torch.rand(6, 1)
    mask = torch.eye(6, dtype=torch.int64)[:, None] * torch.tensor([1, 0, 1, 1, 0, 1])[:, None, None]
    actual, expected = (each.get_submodule(name)(x, mask, weights) for each in (model, eager))
    assert relative_error(actual, expected) < MODEL_BUDGET
    assert not actual[[1, 4]].any()


def adapted(folder: str, swap: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(folder, dtype)
    if swap:
        assert ktops.swap_experts(model)
    targets = expert_target_parameters(model)
    assert [target.rpartition(".")[2] for target in targets] == ["gate_up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_parameters=targets))
    randomize(model)
    return model


@pytest.mark.parametrize("folder", ["llama4", "longcat_flash"])
def test_peft_equals_plain_peft(folder, no_peft, tmp_path):
    """Factors have the names, shapes and gradients of plain PEFT, without dense deltas."""
    batch = tiny_batch(folder)
    plain = loss_and_gradients(adapted(folder, swap=False), batch)
    exact = loss_and_gradients(adapted(folder, swap=False, dtype=torch.float64), batch)
    model = adapted(folder, swap=True)
    with Recorder() as recorder:
        actual = loss_and_gradients(model, batch)
    assert recorder.calls["moe_sft_bwd"] == recorder.calls["moe_sft_fwd"] > 0
    stacks = {parameter.shape for parameter in model.parameters() if parameter.dim() == 3}
    assert stacks and not stacks & recorder.shapes
    assert_as_close(actual, plain, exact, torch.float32)
    swapped_last = adapted(folder, swap=False)
    assert ktops.swap_experts(swapped_last)
    assert_as_close(loss_and_gradients(swapped_last, batch), plain, exact, torch.float32)

    model.save_pretrained(tmp_path)
    ktops.disable()
    plain_model = adapted(folder, swap=False)
    plain_model.load_adapter(tmp_path, "saved")
    plain_model.set_adapter("saved")
    expected = logits(plain_model.eval(), folder)
    assert relative_error(logits(model.eval(), folder), expected) < MODEL_BUDGET
    merged = model.merge_and_unload()
    assert ktops.unswap_experts(merged)
    assert relative_error(logits(merged, folder), expected) < MODEL_BUDGET


def test_experts_of_longcat_without_weights():
    """Ids from the number of experts with weights on return their input, multiplied by the routing weight."""
    model, eager = swapped("longcat_flash"), tiny_model("longcat_flash")
    name = "model.layers.0.mlp.experts"
    experts, own = model.get_submodule(name), eager.get_submodule(name)
    num_experts, total = own.num_routed_experts, own.total_experts
    assert total > num_experts == experts.num_experts
    for ids in (torch.full((5, 2), num_experts), torch.arange(10).view(5, 2) % total):
        x, weights = torch.randn(5, 32, requires_grad=True), torch.rand(5, 2, requires_grad=True)
        results = []
        for module in (experts, own):
            output = module(x, ids, weights)
            results.append((output, *torch.autograd.grad(output.square().sum(), (x, weights))))
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < MODEL_BUDGET


def test_unchosen_experts_of_llama4_are_skipped():
    """transformers computes all experts for all tokens; the op reads only the weights of those chosen."""
    model = swapped("llama4")
    experts = next(module for module in model.modules() if isinstance(module, KTExperts))
    rows = torch.randn(experts.num_experts, 7, experts.hidden_size)
    rows[1:] = 0
    with torch.no_grad():
        experts.gate_up_proj[1:] = experts.down_proj[1:] = torch.nan
        output = experts(rows.flatten(0, 1)).view_as(rows)
    assert output[0].any(-1).all() and not output[1:].any()


def add_hook(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ in ("JetMoeMoE", "JetMoeBlock"):
            module.input_linear.register_forward_hook(lambda module, args, output: 2 * output)
        if type(module).__name__ == "DbrxExperts":
            module.mlp.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("folder", ["dbrx", "jetmoe"])
def test_hooks_that_come_after_the_swap_are_called(folder):
    eager, model, plain = tiny_model(folder), swapped(folder), tiny_model(folder)
    add_hook(eager)
    add_hook(model)
    with CountOps() as ops, pytest.warns(UserWarning, match="has adapters or hooks. Its own forward runs"):
        actual = logits(model, folder)
    assert not ops.counts
    expected = logits(eager, folder)
    assert relative_error(actual, expected) < MODEL_BUDGET
    assert relative_error(logits(plain, folder), expected) > 0.01


@every_folder
def test_hooked_experts_stay(folder):
    model = tiny_model(folder)
    names = ktops.swap_experts(model)
    ktops.unswap_experts(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: output)
    with pytest.warns(UserWarning, match="it has hooks"):
        assert ktops.swap_experts(model) == []


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_load_experts_of_llama4(weight_format, enabled, tmp_path):
    """The loaded experts take the arguments that the model passes; what is saved loads again."""
    dense = tiny_model("llama4").eval()
    dense.save_pretrained(tmp_path / "dense")
    model = tiny_model("llama4").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if IN_EXPERTS.search(name):
                parameter.zero_()
    ktops.load_experts(model, tmp_path / "dense", weight_format, show_progress=False)
    expected = logits(model, "llama4")
    error = relative_error(expected, logits(dense, "llama4"))
    assert error < (0.05 if weight_format else MODEL_BUDGET)
    model.save_pretrained(tmp_path / "saved")
    config = {"quantization_config": ktops.KTConfig(weight_format)}
    for path, options in (("saved", {}), ("dense", config)):
        loaded = type(model).from_pretrained(tmp_path / path, **options)
        assert torch.equal(logits(loaded, "llama4"), expected)


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {"step3p7"}))
def test_modules_with_other_arguments_stay(folder, monkeypatch):
    """They belong to another version of transformers."""
    model = tiny_model(folder)
    [name, *_] = ktops.swap_experts(model)
    ktops.unswap_experts(model)
    monkeypatch.setattr(type(model.get_submodule(name)), "forward", lambda self, x, others: x)
    with pytest.warns(UserWarning, match=r"its forward takes \(x, others\), not \("):
        assert ktops.swap_experts(model) == []


@pytest.mark.parametrize("folder", ["llama4", "longcat_flash"])
@pytest.mark.parametrize("swap", [True, False])
def test_quantize_experts(folder, swap, no_peft):
    """Experts in a format take the arguments that the model passes."""
    model, plain = (swapped if swap else tiny_model)(folder).eval(), tiny_model(folder).eval()
    ktops.quantize_experts(model, "int8", show_progress=False)
    with CountOps() as ops:
        actual = logits(model, folder)
    assert ops.counts
    assert relative_error(actual, logits(plain, folder)) < 0.1


@pytest.mark.parametrize("folder", ["llama4", "longcat_flash"])
def test_quantized_experts_are_saved_and_loaded(folder, enabled, tmp_path):
    model = tiny_model(folder).eval()
    ktops.quantize_experts(model, "int8", show_progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), folder), logits(model, folder))


def test_adapters_of_quantized_llama4(no_peft):
    """They are interchangeable with those of the model that is not quantized."""
    models = []
    for quantized in (False, True):
        model = tiny_model("llama4").eval()
        if quantized:
            ktops.quantize_experts(model, "int8", show_progress=False)
        targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
        models.append(get_peft_model(model, LoraConfig(r=2, target_parameters=targets)))
    plain, model = models
    without = logits(plain, "llama4")
    randomize(plain)
    adapter = {name: value for name, value in plain.state_dict().items() if "lora_" in name}
    assert not model.load_state_dict(adapter, strict=False).unexpected_keys
    expected = logits(plain, "llama4")
    assert relative_error(logits(model, "llama4"), expected) < 0.1 < relative_error(without, expected)
