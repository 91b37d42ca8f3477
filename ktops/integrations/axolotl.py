"""A plugin for axolotl.

Example, in axolotl's configuration:
    plugins:
      - ktops.integrations.axolotl.KtopsPlugin
    experts_implementation: ktops
"""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from torch import nn

from ktops.integrations import enable, training
from ktops.integrations.transformers import NAME


class KtopsArgs(BaseModel):
    """Checks the keys that the plugin depends on."""

    @model_validator(mode="before")
    @classmethod
    def check_experts_implementation(cls, data: dict) -> dict:
        """Requires the key rather than setting it: axolotl trains on if a plugin cannot be imported."""
        given = data.get("experts_implementation")
        if given != NAME:
            raise ValueError(f"KtopsPlugin needs `experts_implementation: {NAME}`, got {given!r}")
        return data


class KtopsPlugin(BasePlugin):
    """Runs the experts of a model through ktops."""

    def get_input_args(self) -> str:
        """Returns the class that validates the configuration."""
        return f"{__name__}.{KtopsArgs.__name__}"

    def pre_model_load(self, cfg) -> None:
        """Registers ktops with transformers and PEFT, and checks that training uses it."""
        enable()
        training.enable()

    def get_training_args(self, cfg) -> dict[str, bool]:
        """Returns arguments of the trainer: it runs on the CPU, also beside a GPU, and in bfloat16 there."""
        return {"use_cpu": True}

    def post_model_load(self, cfg, model: nn.Module) -> None:
        """Raises a RuntimeError if no experts of the model would run through ktops."""
        training.require_op(model)
