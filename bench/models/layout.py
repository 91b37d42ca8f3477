"""The tensors of a published model: names, dtypes and shapes, from its configuration alone."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

FP8_BLOCK = 128
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
MXFP4_BLOCK = 32
DTYPES = ("bf16", "fp8", "mxfp4")

NORMAL, ONES, ZEROS, IDS, BYTES, EXPONENTS = "normal", "ones", "zeros", "ids", "bytes", "exponents"
CODES, SCALES = "codes", "scales"

_LINEAR = re.compile(r"(_proj|_proj_with_mqa|\.w[123])\.weight$")
_MXFP4 = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Spec:
    """A tensor of a file, and the kind of its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: str = NORMAL

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_config(like: str) -> dict:
    """Reads the configuration with a name in NAMES, or in a file.

    Raises:
        ValueError: it is neither of the two.
    """
    path = CONFIGS / f"{like}.json" if like in NAMES else Path(like)
    if not path.is_file():
        raise ValueError(f"like must be one of {', '.join(NAMES)}, or a config.json; got {like!r}")
    return json.loads(path.read_text())


def published_dtype(config: dict) -> str:
    """Returns the dtype in which the model is published; DeepSeek-V4, in FP4 and FP8, counts as bf16."""
    if config["model_type"] == "deepseek_v4":
        return "bf16"
    return config.get("quantization_config", {}).get("quant_method", "bf16")


def changed_config(config: dict, layers: int | None = None, dtype: str | None = None) -> dict:
    """Returns the configuration with only the first layers, and with the quantization_config of a dtype.

    Args:
        config: a configuration as published.
        layers: default: all.
        dtype: one of DTYPES; default: as published.

    Raises:
        ValueError: the model has fewer layers, or its experts are not published in a layout for the dtype.
    """
    published, family, total = published_dtype(config), config["model_type"], config["num_hidden_layers"]
    dtype = dtype or published
    if layers is not None and not 1 <= layers <= total:
        raise ValueError(f"layers must be from 1 to {total}, got {layers}")
    if dtype == "mxfp4" != published or (dtype == "fp8" and family in ("gpt_oss", "deepseek_v4")):
        raise ValueError(f"dtype must be bf16, or that of the published model, {published}; got {dtype}")
    changed = {key: value for key, value in config.items() if key != "_name_or_path"}
    if layers is not None:
        for key, value in changed.items():
            if isinstance(value, list) and len(value) == total:
                changed[key] = value[:layers]
        changed["num_hidden_layers"] = layers
    if dtype != published or dtype == "bf16":
        changed.pop("quantization_config", None)
        changed.pop("expert_dtype", None)
    if dtype == "fp8":
        routers = [f"model.layers.{layer}.mlp.gate" for layer in range(changed["num_hidden_layers"])]
        changed.setdefault("quantization_config", {**FP8, "modules_to_not_convert": ["lm_head", *routers]})
    return changed


def tensors(config: dict) -> dict[str, Spec]:
    """Returns the tensors of a model's files, in order. Layers for multi-token prediction are left out.

    Args:
        config: a configuration as published; its quantization_config, if any, is that of FP8 or MXFP4.
    """
    method = config.get("quantization_config", {}).get("quant_method")
    specs: dict[str, Spec] = {}
    for name, tensor in _unquantized(config).items():
        shape, spec = tuple(tensor.shape), _spec(name, tensor)
        if method == "fp8" and _LINEAR.search(name):
            blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
            scales = torch.bfloat16 if config["model_type"] == "qwen3_moe" else torch.float32
            specs[name] = Spec(torch.float8_e4m3fn, shape, CODES)
            specs[f"{name}_scale_inv"] = Spec(scales, blocks, SCALES)
        elif method == "mxfp4" and _MXFP4.search(name):
            experts, columns, rows = shape
            scaled = (experts, rows, columns // MXFP4_BLOCK)
            specs[f"{name}_blocks"] = Spec(torch.uint8, (*scaled, MXFP4_BLOCK // 2), BYTES)
            specs[f"{name}_scales"] = Spec(torch.uint8, scaled, EXPONENTS)
        else:
            specs[name] = spec
    return specs


def _unquantized(config: dict) -> dict[str, torch.Tensor]:
    """Returns the model's tensors on the meta device, under the published names, which transformers knows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    options = {
        k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "expert_dtype")
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **options), dtype=torch.bfloat16
        )
    state = revert_weight_conversion(model, model.state_dict())
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    if config["model_type"] == "deepseek_v4":
        return {_deepseek_v4_name(name): tensor for name, tensor in state.items()}
    return state


def _deepseek_v4_name(name: str) -> str:
    """Undoes two renamings that apply to names without "model." and that transformers does not revert."""
    name = name.removeprefix("model.").replace("hc_head.hc_", "hc_head_")
    return name.replace("embed_tokens.", "embed.").replace("lm_head.", "head.")


def _spec(name: str, tensor: torch.Tensor) -> Spec:
    """Routers and norms that transformers keeps in float32 are published in bfloat16."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if dtype == torch.float32 and name.endswith(".weight"):
        dtype = torch.bfloat16
    if not dtype.is_floating_point:
        return Spec(dtype, shape, IDS)
    if len(shape) > 1:
        return Spec(dtype, shape)
    return Spec(dtype, shape, ONES if name.endswith("norm.weight") else ZEROS)
