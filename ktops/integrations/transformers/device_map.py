"""Checks where ``from_pretrained(..., device_map=...)`` puts a model, before it loads anything."""

from collections import Counter

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map
from transformers.quantizers.base import HfQuantizer

from ktops.devices.accelerator import require_room
from ktops.integrations.loading import PendingExperts
from ktops.integrations.transformers.architectures import in_interface
from ktops.nn.find import find_experts

NOT_DEVICES = ("cpu", "disk", "meta")


def require_experts_on_cpu(model: PreTrainedModel, device_map: dict) -> None:
    """Raises if the device map puts experts that are set to run through ktops on an accelerator.

    Raises:
        ValueError: the message says how to load the model instead.
    """
    devices = accelerators(device_map)
    if devices and any(map(in_interface, find_experts(model).values())):
        device = devices[0]
        raise ValueError(
            f"from_pretrained: with experts_implementation='ktops', device_map must not name {device}: it "
            f"would put the experts of {type(model).__name__} there, and ktops runs them in CPU memory. To "
            "load the experts into CPU memory and the other weights to the device, pass "
            f"quantization_config=ktops.KTConfig(). Or load without device_map, and call "
            f"ktops.offload_experts(model, {str(device)!r})"
        )


def without_experts(model: PreTrainedModel, device_map: dict) -> dict:
    """Returns a device map without the entries for experts, whose placeholders hold no weights.

    If one device remains, accelerate does not dispatch the model.
    """
    pending = [name for name, module in model.named_modules() if isinstance(module, PendingExperts)]
    return {
        key: device
        for key, device in device_map.items()
        if not any(key == name or key.startswith(f"{name}.") for name in pending)
    }


def require_room_without_experts(model: PreTrainedModel, device_map: dict, quantizer: HfQuantizer) -> None:
    """Raises if a device has no room for the weights that the device map puts there.

    Args:
        model: on the meta device, with placeholders in place of its experts.

    Raises:
        torch.OutOfMemoryError: the message says how much room they need.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    needed: Counter[torch.device] = Counter()
    for name, device in expand_device_map(device_map, list(tensors)).items():
        if str(device) not in NOT_DEVICES and name not in model.all_tied_weights_keys:
            size = quantizer.param_element_size(model, name, tensors[name])
            needed[torch.device(device)] += int(tensors[name].numel() * size)
    for device, nbytes in needed.items():
        require_room(device, nbytes, f"from_pretrained: {type(model).__name__} without its experts")


def accelerators(device_map: dict) -> list[torch.device]:
    """Returns the accelerators that a device map names."""
    names = dict.fromkeys(device_map.values())
    return [torch.device(name) for name in names if str(name) not in NOT_DEVICES]
