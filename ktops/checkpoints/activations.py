"""Maps transformers' names of activations to those of the op."""

_ROWS = (
    ("silu", "transformers.activations.SiLUActivation", "silu"),
    ("swish", "torch.nn.modules.activation.SiLU", "silu"),
    ("gelu", "transformers.activations.GELUActivation", "gelu"),
    ("gelu_python", "transformers.activations.GELUActivation", "gelu"),
    ("gelu_new", "transformers.activations.NewGELUActivation", "gelu_tanh"),
    ("gelu_fast", "transformers.activations.FastGELUActivation", "gelu_tanh"),
    ("gelu_accurate", "transformers.activations.AccurateGELUActivation", "gelu_tanh"),
    ("gelu_pytorch_tanh", "transformers.activations.GELUTanh", "gelu_tanh"),
    ("gelu_python_tanh", "transformers.activations.GELUTanh", "gelu_tanh"),
    ("relu", "torch.nn.modules.activation.ReLU", "relu"),
    ("relu2", "transformers.activations.ReLUSquaredActivation", "relu2"),
    ("sigmoid", "torch.nn.modules.activation.Sigmoid", "sigmoid"),
)
"""hidden_act in config.json, class of the module, activation of the op."""

BY_HIDDEN_ACT = {hidden_act: name for hidden_act, _, name in _ROWS}
BY_CLASS = {module: name for _, module, name in _ROWS}
"""Uses names to avoid importing transformers."""
