"""The tests that KTransformers' usage document lists (5.1 to 5.3), with its sizes; 5.4 is bench/usage.py."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from ktops import compat
from ktops.compat.kt_kernel.sft.arch import (
    KTAMXConfigError,
    KTAMXModelNotSupportedError,
    get_moe_arch_config,
)

HIDDEN, INTERMEDIATE, RANK, EXPERTS = 7168, 2048, 16, 2
ALPHA = 32.0
BF16 = torch.bfloat16


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=BF16) * scale


@pytest.fixture(scope="module")
def moe_amx():
    """Experts of the document's sizes, two of them."""
    torch.manual_seed(0)
    wrapper = compat.KTMoEWrapper(
        0,
        EXPERTS,
        1,
        HIDDEN,
        INTERMEDIATE,
        method="AMXBF16_SFT",
        mode="sft",
        lora_rank=RANK,
        lora_alpha=ALPHA,
    )
    one = random(INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5)
    gate, up = torch.stack([one, one.flip(1)]), torch.stack([one.flip(0), -one])
    down = 2 * torch.stack([one.t(), one.flip(0).t()])
    wrapper.load_weights_from_tensors(gate, up, down)
    return wrapper


@pytest.fixture
def wrapper(moe_amx):
    """A block of DeepSeek-V3 with these experts and, as the document has them, adapters."""
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS, n_shared_experts=1,
        num_experts_per_tok=1, n_group=1, topk_group=1, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        block = DeepseekV3MoE(config).to(BF16)
    block.gate.weight = torch.nn.Parameter(random(EXPERTS, HIDDEN, scale=HIDDEN**-0.5), False)
    block.gate.e_score_correction_bias = torch.zeros(EXPERTS)
    for linear in (
        block.shared_experts.gate_proj,
        block.shared_experts.up_proj,
        block.shared_experts.down_proj,
    ):
        weight = random(1, linear.in_features, scale=linear.in_features**-0.5).expand(linear.weight.shape)
        linear.weight = torch.nn.Parameter(weight, False)
    lora_params = compat.create_lora_params(EXPERTS, HIDDEN, INTERMEDIATE, RANK, ALPHA)
    moe_config = get_moe_arch_config(config)
    cpu_infer = compat.init_cpu_infer(SimpleNamespace(kt_num_threads=None, kt_tp_enabled=True))
    return compat.MOELayerWrapper(block, moe_amx, cpu_infer, lora_params, moe_config, HIDDEN, 0)


def test_moe_layer_wrapper_forward_and_backward(wrapper):
    hidden_states = random(2, 128, HIDDEN).requires_grad_()
    output = wrapper(hidden_states)
    assert output.shape == hidden_states.shape and output.device == hidden_states.device
    output.sum().backward()
    assert hidden_states.grad.isfinite().all() and hidden_states.grad.abs().max() > 0
    assert len(wrapper.lora_params) == 6
    for name, param in wrapper.lora_params.items():
        assert param.grad is not None and param.grad.isfinite().all(), name
    assert all(wrapper.lora_params[name].grad.abs().max() > 0 for name in ("gate_lora_b", "down_lora_b"))


def test_lora_pointer_update(wrapper):
    hidden_states = random(1, 4, HIDDEN)
    before = wrapper(hidden_states)
    for param in wrapper.lora_params.values():
        param.data.add_(0.1)
    wrapper.update_lora_pointers()
    assert not torch.equal(wrapper(hidden_states), before)


def reference_moe_forward(hidden_states, gate_proj, up_proj, down_proj, params, scaling):
    """The reference of the document: one expert, in the dtype of the arguments."""

    def project(x, weight, name):
        return (
            x @ weight.t() + x @ params[f"{name}_lora_a"][0].t() @ params[f"{name}_lora_b"][0].t() * scaling
        )

    intermediate = F.silu(project(hidden_states, gate_proj, "gate")) * project(hidden_states, up_proj, "up")
    return project(intermediate, down_proj, "down")


def test_precision_bf16(moe_amx):
    params = {
        name: torch.nn.Parameter(random(*param.shape, scale=param.shape[2] ** -0.5))
        for name, param in compat.create_lora_params(EXPERTS, HIDDEN, INTERMEDIATE, RANK, ALPHA).items()
    }
    hidden_states, grad_output = random(4, HIDDEN), random(4, HIDDEN)
    logits = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    results = []
    for dtype in (BF16, torch.float32):
        leaves = {name: param.detach().to(dtype).requires_grad_() for name, param in params.items()}
        x = hidden_states.to(dtype).requires_grad_()
        if dtype == BF16:
            output = compat.MOEAMXFunction.apply(x, logits, moe_amx, None, leaves, None, HIDDEN, 1)
        else:
            gate, up = moe_amx.gate_up_proj[0].float().chunk(2)
            down = moe_amx.down_proj[0].float()
            output = reference_moe_forward(x, gate, up, down, leaves, ALPHA / RANK)
        gradients = torch.autograd.grad(output, [x, *leaves.values()], grad_output.to(dtype))
        results.append([output.detach(), *gradients])

    def relative_error(actual, expected):
        return (expected - actual).abs().mean() / expected.abs().mean()

    errors = [float(relative_error(actual, expected)) for actual, expected in zip(*results, strict=True)]
    assert errors[0] < 0.05, f"Forward error {errors[0]} exceeds threshold 0.05"
    assert max(errors[1:]) < 0.10, f"Backward error {max(errors[1:])} exceeds threshold 0.10"


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny DeepSeek-V2 on disk."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
        n_shared_experts=2, num_experts_per_tok=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, pad_token_id=None,
    )  # fmt: skip
    transformers.DeepseekV2ForCausalLM(config).to(BF16).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(path: str, **options):
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(path)
    model_args = SimpleNamespace(**({"model_name_or_path": path, "kt_backend": "AMXBF16"} | options))
    return compat.load_kt_model(config, model_args, SimpleNamespace(lora_rank=8, lora_alpha=16))


def trainer(model, folder, **options):
    ids = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, learning_rate=1e-2, report_to="none",
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    trained = {id(parameter) for parameter in compat.get_kt_lora_params(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return transformers.Trainer(model, arguments, train_dataset=data)


@pytest.mark.usefixtures("single_thread")
def test_training_saves_its_state_and_resumes(checkpoint, tmp_path):
    model = load(checkpoint)
    assert [wrapper.layer_idx for wrapper in model._kt_wrappers] == [1, 2]
    assert all(type(wrapper) is compat.MOELayerWrapper for wrapper in model._kt_wrappers)
    first = trainer(model, tmp_path / "run", max_steps=10, save_steps=5)
    loss = first.train().training_loss
    assert (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").exists()
    resumed = trainer(load(checkpoint), tmp_path / "run", max_steps=20, save_steps=5)
    later = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    state = json.loads((tmp_path / "run" / "checkpoint-20" / "trainer_state.json").read_text())
    assert state["global_step"] == later.global_step == 20 and later.training_loss < loss
    straight = trainer(load(checkpoint), tmp_path / "straight", max_steps=20, save_strategy="no")
    straight.train()
    for mine, other in zip(*map(compat.get_kt_lora_params, (resumed.model, straight.model)), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("backend", ["AMXBF16", "amxint8", "AMXINT4_SkipLoRA"])
def test_wrapped_blocks_compute_what_the_model_computes(checkpoint, backend):
    model = load(checkpoint, kt_backend=backend)
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=BF16)
    ids = torch.arange(24).view(2, 12)
    expected, actual = reference(ids).logits, model(ids).logits
    bound = {"AMXBF16": 0.02, "amxint8": 0.04, "AMXINT4_SkipLoRA": 0.4}[backend]
    assert (actual - expected).norm() < bound * expected.norm()
    assert (model._kt_wrappers[0].lora_params is None) == backend.endswith("SkipLoRA")
    assert set(reference.state_dict()) <= set(model.state_dict()) or backend != "AMXBF16"
    copied = copy.deepcopy(model)
    for parameter in compat.get_kt_lora_params(copied):
        parameter.data.add_(0.1)
    assert torch.equal(model(ids).logits, actual)
    if not backend.endswith("SkipLoRA"):
        assert not torch.equal(copied(ids).logits, actual)


def test_errors_say_what_to_do(checkpoint):
    arguments = SimpleNamespace(model_name_or_path=checkpoint), SimpleNamespace(lora_rank=8, lora_alpha=16)
    config = transformers.OlmoeConfig(architectures=["OlmoeForCausalLM"])
    with pytest.raises(
        KTAMXModelNotSupportedError,
        match=r"OlmoeForCausalLM not supported for KTransformers: .*DeepseekV2.*Mix",
    ):
        compat.load_kt_model(config, *arguments)
    with pytest.raises(KTAMXConfigError, match=r"kt_backend must be one of .*, got 'AMX7'"):
        load(checkpoint, kt_backend="AMX7")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(KTAMXConfigError, match="no wrapped MoE layers"):
        compat.update_kt_lora_pointers(model)
    assert compat.get_kt_lora_params(model) == []
    compat.wrap_moe_layers_with_amx(model, *arguments)
    with pytest.raises(KTAMXConfigError, match="wrapped before"):
        compat.wrap_moe_layers_with_amx(model, *arguments)
