"""Compares transformers models with experts implementation "ktops", or with swapped experts, with eager."""

import copy
import json

import every_model
import pytest
import torch
import transformers
from model_runs import MODEL_BUDGET, CountOps, assert_close, experts_modules, stable_seed, step
from tiny_models import ARCHITECTURES, tiny_batch, tiny_config, tiny_model

import ktops
from ktops.nn import KTExperts
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.counts import counted

pytestmark = pytest.mark.usefixtures("enabled")


def through_interface(model):
    model.set_experts_implementation("ktops")
    return model


def through_swap(model):
    names = experts_modules(model)
    assert ktops.swap_experts(model) == names
    return model


both_ways = pytest.mark.parametrize("through", [through_interface, through_swap])


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tiny_batch()["input_ids"] if ids is None else ids).logits


@both_ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_step_equals_eager(architecture, through):
    """Compares logits, loss, auxiliary loss and the gradient of every parameter in float32."""
    keys = {"output_router_logits": True}
    has_aux_loss = hasattr(tiny_config(architecture), "router_aux_loss_coef")
    if has_aux_loss:
        keys["router_aux_loss_coef"] = 0.1
    eager = step(tiny_model(architecture, **keys))
    exact = step(tiny_model(architecture, **keys).double())
    model = through(tiny_model(architecture, **keys))
    actual = step(model)
    assert (actual.aux_loss is not None) == has_aux_loss
    assert_close(actual, eager, exact)
    layers = len(experts_modules(model))
    assert actual.ops == {"moe_sft_fwd": layers, "moe_sft_bwd": layers}
    assert not eager.ops and layers > 0


@both_ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_equals_eager(architecture, through):
    """Results are as close as eager bfloat16 to float64 on the same rounded weights, the loss in budget."""
    seed = stable_seed(architecture)
    eager = step(tiny_model(architecture, dtype=torch.bfloat16, seed=seed))
    exact = step(tiny_model(architecture, dtype=torch.bfloat16, seed=seed).double())
    actual = step(through(tiny_model(architecture, dtype=torch.bfloat16, seed=seed)))
    assert_close(actual, eager, exact)
    assert relative_error(actual.loss, exact.loss) < forward_budget(torch.bfloat16)
    assert actual.ops["moe_sft_bwd"] > 0


@both_ways
@pytest.mark.parametrize("folder", ["gpt_oss", "phimoe"])
def test_equals_grouped_mm(folder, through):
    """In old versions of transformers, gpt-oss does not say that it interleaves gate and up, and PhiMoE's
    router gives a weight for every expert, which its eager experts mistake for those of the chosen ones."""
    batch = every_model.tiny_batch(folder)
    plain = every_model.tiny_model(folder)
    plain.set_experts_implementation("grouped_mm")
    expected = step(plain, batch)
    actual = step(through(every_model.tiny_model(folder)), batch)
    assert actual.ops["moe_sft_bwd"] == 2 and not expected.ops
    assert relative_error(actual.logits, expected.logits) < MODEL_BUDGET
    for name, gradient in expected.gradients.items():
        assert relative_error(actual.gradients[name], gradient) < MODEL_BUDGET, name


def test_enable_is_idempotent_and_disable_undoes_it():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registered = ALL_EXPERTS_FUNCTIONS["ktops"]
    ktops.enable()
    assert ALL_EXPERTS_FUNCTIONS["ktops"] is registered
    model = tiny_model("qwen3_moe", experts_implementation="ktops")
    ktops.disable()
    ktops.disable()
    assert "ktops" not in ALL_EXPERTS_FUNCTIONS
    with pytest.raises(KeyError, match="ktops"):
        logits(model)
    with pytest.raises(ValueError, match="ktops"):
        tiny_model("mixtral", experts_implementation="ktops")
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))


def test_from_pretrained_and_from_config(tmp_path):
    """The implementation is chosen by keyword and not stored with the model."""
    model = tiny_model("qwen3_moe", experts_implementation="ktops")
    model.save_pretrained(tmp_path)
    assert "ktops" not in (tmp_path / "config.json").read_text()
    assert "model_type" in json.loads((tmp_path / "config.json").read_text())
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, experts_implementation="ktops")
    with CountOps() as ops:
        assert torch.equal(logits(loaded), logits(model))
    assert ops.counts["moe_fwd"] == 4
    assert auto.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"

    made = auto.from_config(tiny_config("qwen3_moe"), experts_implementation="ktops")
    with CountOps() as ops:
        logits(made)
    assert ops.counts == {"moe_fwd": 2}


def test_set_experts_implementation_back_and_forth():
    model = tiny_model("qwen3_moe")
    for implementation, count in (("ktops", 2), ("eager", 0), ("ktops", 2)):
        model.set_experts_implementation(implementation)
        assert step(model).ops["moe_sft_fwd"] == count


@both_ways
def test_two_models_two_forwards_then_two_backwards(through):
    models = [through(tiny_model(name)) for name in ("qwen3_moe", "deepseek_v3")]
    expected = [step(tiny_model(name)) for name in ("qwen3_moe", "deepseek_v3")]
    losses = [model(**tiny_batch()).loss for model in models + models[::-1]]
    for loss in losses:
        loss.backward()
    for model, run in zip(models, expected, strict=True):
        for name, parameter in model.named_parameters():
            assert relative_error(parameter.grad, 2 * run.gradients[name]) < MODEL_BUDGET, name


@both_ways
def test_deepcopy_and_state_dict_round_trip(through):
    model = through(tiny_model("qwen3_moe"))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(logits(copied), logits(model))

    eager = tiny_model("qwen3_moe", seed=3)
    assert list(eager.state_dict()) == list(model.state_dict())
    eager.load_state_dict(model.state_dict())
    assert relative_error(logits(model), logits(eager)) < MODEL_BUDGET
    eager = tiny_model("qwen3_moe", seed=4)
    model.load_state_dict(eager.state_dict())
    assert relative_error(logits(model), logits(eager)) < MODEL_BUDGET


@both_ways
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next", "deepseek_v3", "mixtral"])
def test_greedy_generation_equals_eager(architecture, through):
    """Generates with the cache, from a batch of two prompts."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tiny_batch(length=5)["input_ids"]
    expected = tiny_model(architecture).eval().generate(ids, **options)
    model = through(tiny_model(architecture).eval())
    with CountOps() as ops:
        generated = model.generate(ids, **options)
    assert torch.equal(generated, expected)
    assert ops.counts == {"moe_fwd": 12 * len(experts_modules(model))}


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(through, dtype):
    """Under autocast the op runs in the dtype of the weights and returns that of its input."""
    model = through(tiny_model("mixtral"))
    with torch.autocast("cpu", dtype):
        actual = step(model)
        eager = step(tiny_model("mixtral"))
    assert actual.ops["moe_sft_bwd"] == 2
    exact = step(tiny_model("mixtral").double())
    error, eager_error = (relative_error(run.logits, exact.logits) for run in (actual, eager))
    assert error < 2 * eager_error
    assert all(gradient.dtype == torch.float32 for gradient in actual.gradients.values())


@both_ways
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_float16_equals_eager(architecture, through):
    """Results are as close as eager float16 to float64 on the same rounded weights; the loss is in budget."""
    seed = stable_seed(architecture)
    eager = step(tiny_model(architecture, dtype=torch.float16, seed=seed))
    exact = step(tiny_model(architecture, dtype=torch.float16, seed=seed).double())
    model = through(tiny_model(architecture, dtype=torch.float16, seed=seed))
    actual = step(model)
    assert_close(actual, eager, exact)
    assert relative_error(actual.loss, exact.loss) < forward_budget(torch.float16)
    layers = len(experts_modules(model))
    assert actual.ops == {"moe_sft_fwd": layers, "moe_sft_bwd": layers}


@both_ways
def test_hooks_on_experts_are_called(through):
    """Also if accelerate has replaced the forward to load the weights just in time."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = through(tiny_model("qwen3_moe"))
    called = []
    for name in experts_modules(model):
        experts = model.get_submodule(name)
        experts.register_forward_pre_hook(lambda module, args: called.append("before"))
        experts.register_forward_hook(lambda module, args, output: called.append("after"))
        weights = {key: weight.detach() for key, weight in experts.state_dict().items()}
        add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True, weights_map=weights))
        assert experts.down_proj.is_meta
    with CountOps() as ops:
        actual = logits(model)
    assert ops.counts and called == ["before", "after"] * 2
    assert relative_error(actual, logits(tiny_model("qwen3_moe"))) < MODEL_BUDGET


@both_ways
def test_save_pretrained_of_ktops_model(tmp_path, through):
    model = through(tiny_model("deepseek_v3"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert relative_error(logits(model.eval()), logits(loaded)) < MODEL_BUDGET
    assert not any(isinstance(module, KTExperts) for module in loaded.modules())


@both_ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_add_views_and_no_copies_to_the_operator(architecture, through):
    """This includes float32 route weights with bfloat16 experts."""
    model = through(tiny_model(architecture).to(torch.bfloat16))
    experts = model.get_submodule(experts_modules(model)[0])
    x = torch.ones(5, experts.down_proj.shape[1], dtype=torch.bfloat16)
    ids, weights = torch.arange(10).view(5, 2) % experts.num_experts, torch.ones(5, 2)
    with torch.no_grad(), counted() as counts:
        output = experts(x, ids, weights)
    assert counts.allocations == [output.nbytes] and counts.operators["kt::moe_fwd"] == 1
    assert counts.operators.total() <= 14, counts.operators
