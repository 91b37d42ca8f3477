"""Builds tiny vision-language models with experts, and batches with an image."""

import inspect
import re

import every_model
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

GRID = (1, 4, 4)
"""Frames, rows and columns of the image in patches, for models that take patches."""


def vision_model_folders() -> dict[str, str]:
    """Maps the model types of vision-language models with experts to the folders of their text models."""
    folders = set(every_model.folders())
    found = {}
    for model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        config_class = configuration_auto.CONFIG_MAPPING[model_type]
        if "vision_config" in config_class.sub_configs:
            text = getattr(config_class(), "text_config", None)
            for part in (model_type, getattr(text, "model_type", model_type)):
                folder = configuration_auto.model_type_to_module_name(part)
                if folder in folders:
                    found[model_type] = folder
    return found


def vision_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a tiny random vision-language model, in training mode, with eager experts."""
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    return every_model.random_model(model_type, getattr(transformers, name), dtype)


def image_batch(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Returns a text with an image, which depends on the seed, and a text without."""
    parameters = inspect.signature(model.forward).parameters
    image = _image(model, seed)
    num_tokens = _num_tokens(model, image)
    (token,) = _tokens(model.config, r"image_token_(id|index)")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, every_model.FIRST_SPECIAL_TOKEN, (2, num_tokens + 8), generator=generator)
    for start in _tokens(model.config, r"(image|vision)_(start|bos)_token_id|boi_token_id"):
        ids[0, 2] = start
    ids[0, 3 : 3 + num_tokens] = token
    is_image = ids == token
    batch = {"input_ids": ids, **image}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in parameters:
            batch[name] = is_image.long()
    if "labels" in parameters:
        batch["labels"] = ids.masked_fill(is_image, -100)
    else:
        batch["decoder_input_ids"] = ids[:, -8:].flip(1)
    return batch


def _tokens(config: transformers.PreTrainedConfig, pattern: str) -> list[int]:
    """Returns the tokens that a configuration has by names like this."""
    return [value for name, value in config.to_dict().items() if re.fullmatch(pattern, name)]


@torch.no_grad()
def _num_tokens(model: PreTrainedModel, image: dict[str, Tensor]) -> int:
    output = _image_encoder(model).get_image_features(**image)
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = output.last_hidden_state
    return sum(feature.numel() // feature.shape[-1] for feature in features)


def _image_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the module that turns images into embeddings, the model itself or a part of it."""
    return next(module for module in model.modules() if hasattr(module, "get_image_features"))


def _image(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Returns the arguments of forward that make up the image, in patches where the model expects them."""
    parameters = inspect.signature(_image_encoder(model).get_image_features).parameters
    model_type, vision = model.config.model_type, model.config.vision_config
    _, rows, columns = GRID
    side = getattr(vision, "patch_size", 0)
    depth = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    image_side = getattr(getattr(vision, "sam_config", vision), "image_size", 0)
    patches = {
        "inkling_mm_model": (depth, side, side, 3),
        "inkling2": (2 * side, 2 * side, 3),
        "inkling2_loop": (2 * side, 2 * side, 3),
        "kimi_k25": (3, side, side),
    }
    shape: tuple[int, ...]
    if "image_position_ids" in parameters:
        shape = (1, rows * columns, 3 * side**2)
    elif model_type in patches or {"image_grid_thw", "image_grid_hw"} & parameters.keys():
        shape = (rows * columns, *patches.get(model_type, (3 * depth * side**2,)))
    else:
        shape = (1, 3, image_side, image_side)
    positions = {
        "image_grid_thw": torch.tensor([GRID]),
        "image_grid_hw": torch.tensor([GRID[1:]]),
        "image_position_ids": torch.cartesian_prod(torch.arange(columns), torch.arange(rows))[None],
        "image_sizes": torch.tensor([[image_side, image_side]]),
    }
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(shape, generator=generator).to(model.dtype)
    return {"pixel_values": pixels} | {k: v for k, v in positions.items() if k in parameters}
