"""Tiny models, adapters that PEFT writes for them, and the updates that PEFT computes."""

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path

import every_model
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft_models import randomize
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, tiny_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
OTHERS = {
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig, {"num_experts_per_tok": 2}),
    "llama4": (
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        {
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 40,
            "pad_token_id": 0,
        },
    ),
}
"""Architectures whose experts are stored as [E, in, out]; Llama-4's do not say so."""

TARGETS = {
    "square": ATTENTION,
    "llama4": ATTENTION,
    "qwen3_moe": ATTENTION,
    "mixtral": ATTENTION,
    "deepseek_v3": LATENT,
    "gpt_oss": ATTENTION,
}

Updates = dict[str, torch.Tensor]
"""Update of every weight, [out, in], or of stacked experts in the layout of the model, by parameter."""


@functools.cache
def base_model(architecture: str) -> transformers.PreTrainedModel:
    """Returns a tiny model of an architecture; do not change it."""
    if architecture == "square":
        return tiny_model("qwen3_moe", moe_intermediate_size=32)
    if architecture == "nemotron_h":
        return every_model.tiny_model(architecture).float()
    if architecture not in OTHERS:
        return tiny_model(architecture)
    model_class, config_class, keys = OTHERS[architecture]
    torch.manual_seed(0)
    counts = {"num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return model_class(config_class(**SIZES, **counts, **keys))


def save_base(architecture: str, folder: Path) -> Path:
    """Writes a model as transformers publishes it, and returns its directory."""
    path = folder / f"base-{architecture}"
    if not path.exists():
        base_model(architecture).save_pretrained(path)
    return path


def save_config(architecture: str, folder: Path) -> Path:
    """Writes config.json only, and returns its directory."""
    path = folder / f"config-{architecture}"
    path.mkdir(exist_ok=True)
    config = base_model(architecture).config
    config.architectures = [type(base_model(architecture)).__name__]
    config.save_pretrained(path)
    return path


def adapted(architecture: str, *, seed: int = 1, dtype: torch.dtype | None = None, **lora) -> PeftModel:
    """Returns the model with random LoRA factors; by default on attention and experts."""
    keys = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(TARGETS.get(architecture, ())),
        "target_parameters": list(EXPERTS),
    }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base_model(architecture)), LoraConfig(**{**keys, **lora}))
    randomize(model, seed)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return model


def save(model: PeftModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


@torch.no_grad()
def updates(model: PeftModel) -> Updates:
    """Returns the updates that PEFT would merge."""
    found: Updates = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in {*module.lora_A, *module.lora_embedding_A}:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", "weight")
            found[f"{path}.{parameter}"] = module.get_delta_weight("default").float()
    return found


def load(architecture: str, path: Path) -> PeftModel:
    """Loads an adapter with PEFT, which must find every tensor and no other."""

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(copy.deepcopy(base_model(architecture)), str(path))


def expect_equal(found: Updates, expected: Updates, tolerance: float = 1e-5) -> None:
    """Asserts that the updates are the same; weights without one may have zeros."""
    assert expected
    for name in found.keys() | expected.keys():
        update = expected.get(name)
        if update is None:
            assert not found[name].any(), name
            continue
        assert found[name].shape == update.shape, name
        error = (found[name].double() - update.double()).abs().max() / update.double().abs().max()
        assert error <= tolerance, (name, float(error))


def change_config(path: Path, **changes) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def swap_roles(adapter: Path, path: Path, version: str = "0.18.1", experts: int = 8) -> Path:
    """Copies an adapter, with the factors of stacked experts as PEFT has them before 0.19.1."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a = a.reshape(experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0)
        tensors[name] = b.flatten(0, 1).contiguous()
        tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()
    path.mkdir()
    shutil.copy(adapter / "adapter_config.json", path)
    change_config(path, peft_version=version)
    save_file(tensors, path / "adapter_model.safetensors")
    return path
