"""The keys use_kt and kt_*: what they mean, and errors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ktops.compat.methods import SFT_METHODS
from ktops.integrations.settings import BACKENDS, REFUSED, WITHOUT_EFFECT, Backend, Settings, take_settings


def test_the_usage_of_every_backend():
    for name, backend in BACKENDS.items():
        for spelled in (name, name.lower(), name.upper()):
            assert take_settings({"use_kt": True, "kt_backend": spelled}).backend == backend
        skipped = take_settings({"use_kt": True, "kt_backend": f"{name}_SFT_SkipLoRA"})
        assert (skipped.backend, skipped.trains_experts) == (backend, False)
    assert {name.partition("_SFT")[0] for name in SFT_METHODS} == set(BACKENDS)


def test_only_its_own_keys_are_taken():
    config = {"use_kt": "true", "lora_rank": 8, "kt_backend": "AMXInt8", "kt_num_threads": "4"}
    config |= {"kt_tp_enabled": True, "kt_num_gpu_experts": 2, "kt_weight_path": None}
    expected = Settings(
        Backend("int8"),
        num_threads=4,
        num_gpu_experts=2,
        without_effect=("kt_num_gpu_experts", "kt_tp_enabled"),
    )
    assert take_settings(config) == expected
    assert config == {"lora_rank": 8}


def test_a_nested_mapping():
    nested = {"enabled": True, "kt_backend": "auto", "kt_expert_weight_format": "int8"}
    config = {"use_kt": True, "kt_config": nested, "kt_cpu_activation": "recompute"}
    expected = Settings(Backend("int8"), without_effect=("kt_cpu_activation",))
    assert take_settings(config) == expected and not config


def test_off():
    for config in ({}, {"use_kt": False}, {"use_kt": "false", "kt_backend": "AMXBF16"}):
        assert take_settings(config) is None and not config


ERRORS = [
    ({"kt_backend": "auto"}, "kt_backend: these keys need use_kt: true"),
    ({"use_kt": "maybe"}, "use_kt must be true or false, got 'maybe'"),
    ({"use_kt": True, "kt_bakend": "auto"}, "unknown key kt_bakend. Did you mean kt_backend"),
    ({"use_kt": True, "kt_config": {"kt_thread": 1}}, "unknown key kt_thread"),
    ({"use_kt": True, "kt_config": {"rank": 1}}, "unknown key rank"),
    ({"use_kt": True, "kt_config": [1]}, r"kt_config must be a mapping of kt_\* keys, got \[1\]"),
    ({"use_kt": True, "kt_config": {"enabled": False}}, "kt_config.enabled is false"),
    ({"use_kt": True, "kt_config": {"kt_backend": "a"}, "kt_backend": "b"}, "kt_backend: given twice"),
    ({"use_kt": True, "kt_backend": "AMX"}, "kt_backend must be one of .*AMXBF16.*, got 'AMX'"),
    ({"use_kt": True, "kt_backend": "AMXINT8", "kt_expert_weight_format": "fp8"}, "contradicts kt_backend"),
    ({"use_kt": True, "kt_num_threads": 0}, "kt_num_threads must be a positive integer, got 0"),
    ({"use_kt": True, "kt_num_threads": "many"}, "kt_num_threads must be a positive integer, got 'many'"),
    ({"use_kt": True, "kt_num_gpu_experts": -1}, "kt_num_gpu_experts must be a number of experts, got -1"),
    ({"use_kt": True, "kt_weight_path": "absent"}, "kt_weight_path must name a checkpoint.*, got 'absent'"),
    ({"use_kt": True, "kt_train_mode": "full"}, "kt_train_mode must be lora, got 'full'"),
    *(({"use_kt": True, key: 1}, f"{key} must be absent, got 1") for key in REFUSED),
]


@pytest.mark.parametrize(("config", "message"), ERRORS)
def test_errors_change_nothing(config, message):
    before = json.dumps(config)
    with pytest.raises(ValueError, match=message):
        take_settings(config)
    assert json.dumps(config) == before


def test_keys_without_effect_need_no_value():
    given = dict.fromkeys(WITHOUT_EFFECT, 1)
    assert take_settings({"use_kt": True, **given}).without_effect == tuple(sorted(WITHOUT_EFFECT))


def test_how_the_experts_are_loaded(tmp_path):
    assert Settings().quantization_config() is None
    assert Settings(BACKENDS["AMXBF16"]).quantization_config() is None
    assert Settings(BACKENDS["AMXBF16"]).quantization_config({"quant_method": "fp8"}).weight_format == "bf16"
    assert Settings(BACKENDS["AMXINT8"]).quantization_config().weight_format == "int8"
    up, down = torch.ones(2, 32, 64, dtype=torch.bfloat16), torch.ones(2, 64, 32, dtype=torch.bfloat16)
    names = {"gate_proj": up, "up_proj": up, "down_proj": down}
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": stack[e].clone()
        for name, stack in names.items()
        for e in range(2)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    dense = Settings(BACKENDS["AMXINT8"], weight_path=tmp_path).quantization_config()
    assert (dense.weight_format, dense.experts_path) == ("int8", str(tmp_path))
    codes = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    codes |= {f"{name}_scale_inv": torch.ones(1, 1) for name in tensors}
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    )
    save_file(codes, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="has its experts in fp8_e4m3.*although kt_backend asks for int8"):
        stored = Settings(BACKENDS["AMXINT8"], weight_path=tmp_path).quantization_config()
    assert (stored.weight_format, stored.experts_path) == (None, str(tmp_path))
