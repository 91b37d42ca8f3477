"""LLaMA-Factory's keys and adapters, with a stand-in for the functions that ktops replaces."""

import importlib
import os
import pickle
import sys

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from tiny_models import tiny_model

import ktops
from ktops.integrations import llamafactory, training
from ktops.integrations.llamafactory import arguments, model, places, v1
from ktops.integrations.transformers import default, pretrained

FILES = {
    "__init__.py": "",
    "hparams/__init__.py": "from llamafactory.hparams.parser import read_args",
    "hparams/parser.py": "def read_args(args=None):\n    return args",
    "train/__init__.py": "",
    "train/tuner.py": "from llamafactory.hparams import read_args",
    "extras/__init__.py": "",
    "extras/misc.py": "def check_dependencies():\n    pass",
    "v1/__init__.py": "",
    "v1/core/__init__.py": "",
    "v1/core/base_trainer.py": "class BaseTrainer:\n    def fit(self):\n        self.steps = 1",
    "model/__init__.py": "",
    "model/adapter.py": """
from peft import LoraConfig, get_peft_model

def patch_target_modules(model, finetuning_args, target_modules):
    return target_modules

def init_adapter(config, model, model_args, finetuning_args, is_trainable):
    if not is_trainable:
        return not getattr(model, "quantization_method", None)
    modules, dropout = finetuning_args.lora_target, finetuning_args.lora_dropout
    return get_peft_model(model, LoraConfig(r=2, target_modules=modules, lora_dropout=dropout))
""",
    "model/loader.py": """
from llamafactory.model.adapter import init_adapter

def patch_config(config, tokenizer, model_args, init_kwargs, is_trainable):
    assert not hasattr(config, "quantization_config")
    init_kwargs["device_map"] = {"": "cuda:0"}
""",
}


class Arguments:
    """Any of LLaMA-Factory's groups of arguments."""

    export_dir = None
    train_from_scratch = False
    finetuning_type = "lora"
    lora_target = "all"
    lora_dropout = 0.0

    def __init__(self, **given) -> None:
        self.__dict__.update(given)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """The stand-in, with ktops' functions in place."""
    for name, source in FILES.items():
        file = tmp_path / "llamafactory" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("USE_KT", "")
    monkeypatch.setattr(places.metadata, "version", lambda name: "0.9.5")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    llamafactory.enable()
    importlib.import_module("llamafactory.train.tuner")
    yield importlib.import_module("llamafactory")
    arguments.disable()
    model.disable()
    training.disable()
    for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
        del sys.modules[name]


OPTIONS = {"stage": "sft", "lora_rank": 8}


def test_keys_are_taken_out(factory, capsys):
    given = {
        **OPTIONS,
        "use_kt": True,
        "kt_backend": "amxint8",
        "kt_tp_enabled": True,
        "torch_dtype": "bfloat16",
    }
    assert factory.train.tuner.read_args(given) == OPTIONS
    assert arguments.current().settings.backend.format == "int8"
    assert arguments.current().torch_dtype is torch.bfloat16
    assert capsys.readouterr().err == "ktops: without effect: kt_tp_enabled\n"
    assert given["use_kt"]


def test_every_holder_of_the_function_has_ours(factory):
    for module in (factory.train.tuner, factory.hparams, factory.hparams.parser):
        assert module.read_args is arguments._read_args


def test_training_runs_on_the_cpu(factory):
    read = factory.hparams.read_args
    assert read({"use_kt": True, "output_dir": "out"})["use_cpu"] is True
    assert read({"use_kt": True, "output_dir": "out", "use_cpu": False})["use_cpu"] is False
    assert "use_cpu" not in read({"output_dir": "out"})
    assert read(["--use_kt", "--do_train"]) == ["--do_train", "--use_cpu", "true"]


def test_what_was_read_before_is_not_read_again(factory):
    """LLaMA-Factory passes what it has read to later parsers, and under Ray to other processes."""
    read = factory.hparams.read_args
    options = pickle.loads(pickle.dumps(read({**OPTIONS, "use_kt": True, "kt_num_threads": 1})))
    words = pickle.loads(pickle.dumps(read(["--use_kt", "true", "--kt_num_threads=2"])))
    for taken, threads in ((options, 1), (words, 2)):
        assert read(taken) is taken
        assert arguments.current().settings.num_threads == threads
    assert read(OPTIONS) == OPTIONS
    assert arguments.current().settings is None


def test_command_line(factory):
    words = [
        "--stage",
        "sft",
        "--use_kt",
        "--kt_backend=AMXInt4",
        "--torch_dtype",
        "float32",
        "--lora_rank",
        "8",
    ]
    assert factory.hparams.read_args(words) == ["--stage", "sft", "--lora_rank", "8"]
    assert arguments.current().settings.backend.format == "int4"
    assert arguments.current().torch_dtype is torch.float32


def test_torch_dtype_alone_is_left_to_llamafactory(factory):
    for given in ({"torch_dtype": "bfloat16"}, ["--torch_dtype", "bfloat16"]):
        assert factory.hparams.read_args(given) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_kt": True, "kt_bakend": "BF16"},
            r"unknown key kt_bakend. Did you mean kt_backend\? Known keys: kt",
        ),
        ({"kt_backend": "BF16"}, "kt_backend: these keys need use_kt: true"),
        (
            {"use_kt": True, "torch_dtype": "bf17"},
            "torch_dtype must be auto, bfloat16, float16, float32, got 'bf17'",
        ),
        ({"use_kt": True, "use_unsloth": True}, "use_unsloth must be absent"),
        ({"use_kt": True, "use_llama_pro": True}, "use_llama_pro must be absent"),
    ],
)
def test_mistakes(given, message, factory):
    with pytest.raises(ValueError, match=message):
        factory.hparams.read_args(given)


def test_more_threads_than_cores(factory, capsys, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    factory.hparams.read_args({"use_kt": True, "kt_num_threads": 60})
    assert set_to == [3]
    assert "kt_num_threads 60 is more than the number of cores, 3" in capsys.readouterr().err


def test_use_kt_false_turns_the_launcher_s_default_off(factory):
    default.enable()
    training.enable()
    factory.hparams.read_args({"use_kt": None})
    assert pretrained._default == "ktops" and training._replaced
    factory.hparams.read_args({"use_kt": False, "kt_backend": "BF16"})
    assert pretrained._default is None and not training._replaced


def test_use_kt_true_checks_training(factory):
    for use_kt in (True, False, True):
        factory.hparams.read_args({"use_kt": use_kt})
        assert bool(training._replaced) == use_kt


def read_settings(factory, **keys) -> None:
    factory.hparams.read_args({"use_kt": True, **keys})


def test_config_says_how_experts_are_loaded(factory):
    read_settings(factory, kt_backend="AMXInt8", torch_dtype="float32")
    config, kwargs = tiny_model("qwen3_moe").config, {}
    config.quantization_config = {"quant_method": "gptq"}
    factory.model.loader.patch_config(config, None, Arguments(), kwargs, True)
    assert config.quantization_config == {"quant_method": "gptq"}
    assert config._experts_implementation == "ktops" and config.dtype is torch.float32
    assert kwargs["device_map"] == {"": "cpu"}
    assert kwargs["quantization_config"].weight_format == "int8"


def test_export_loads_dense_experts(factory, capsys):
    read_settings(factory, kt_backend="AMXInt8")
    config, kwargs = tiny_model("qwen3_moe").config, {}
    factory.model.loader.patch_config(config, None, Arguments(export_dir="out"), kwargs, False)
    assert "quantization_config" not in kwargs
    assert "export writes dense weights" in capsys.readouterr().err


def test_other_quantization(factory):
    read_settings(factory, kt_backend="AMXInt8")
    config = tiny_model("qwen3_moe").config
    with pytest.raises(ValueError, match="quantization_bit must be absent"):
        factory.model.loader.patch_config(config, None, Arguments(), {"quantization_config": 1}, True)
    with pytest.raises(ValueError, match="train_from_scratch must be absent"):
        factory.model.loader.patch_config(config, None, Arguments(train_from_scratch=True), {}, True)


def adapted(factory, model=None, **given):
    model = tiny_model("qwen3_moe", experts_implementation="ktops") if model is None else model
    return factory.model.loader.init_adapter(model.config, model, Arguments(), Arguments(**given), True)


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_chat_merges_only_into_dense_experts(factory, weight_format):
    """The stand-in returns what LLaMA-Factory decides by."""
    read_settings(factory)
    model = tiny_model("qwen3_moe", experts_implementation="ktops")
    if weight_format is not None:
        ktops.quantize_experts(model, weight_format)
    merges = factory.model.loader.init_adapter(model.config, model, Arguments(), Arguments(), False)
    assert merges == (weight_format is None)
    assert not hasattr(model, "quantization_method")


def expert_adapters(model) -> set[str]:
    return {module.parameter_name for module in model.modules() if isinstance(module, ParamWrapper)}


def test_adapters_reach_the_experts(factory):
    read_settings(factory)
    model = adapted(factory, lora_target=["q_proj", "down_proj"])
    assert expert_adapters(model) == {"down_proj"}
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} == {"q_proj"}


def test_adapters_without_use_kt_are_llamafactory_s(factory):
    read_settings(factory)
    factory.hparams.read_args({})
    model = adapted(factory, lora_target=["q_proj"])
    assert model.peft_config["default"].target_modules == {"q_proj"}


def test_experts_without_adapters(factory):
    read_settings(factory, kt_backend="AMXBF16_SFT_SkipLoRA")
    assert not expert_adapters(adapted(factory, lora_target=["all"]))
    with pytest.raises(ValueError, match="lora_target experts is only experts, which get no adapters"):
        adapted(factory, lora_target="experts")


def test_dropout_is_that_of_linear_layers(factory, capsys):
    read_settings(factory)
    model = adapted(factory, lora_target=["all"], lora_dropout=0.25)
    assert model.peft_config["default"].lora_dropout == 0
    assert expert_adapters(model) == {"gate_up_proj", "down_proj"}
    dropout = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_dropout["default"]
    assert dropout.p == 0.25
    assert "lora_dropout 0.25 applies to the adapters of linear layers" in capsys.readouterr().err


def test_dropout_without_adapters_on_experts_is_peft_s(factory):
    read_settings(factory)
    model = adapted(factory, lora_target=["all_attention"], lora_dropout=0.25)
    assert model.peft_config["default"].lora_dropout == 0.25


def test_model_whose_experts_run_elsewhere(factory):
    read_settings(factory)
    with pytest.raises(RuntimeError, match=r"would run through ktops: .*experts_implementation='eager'"):
        adapted(factory, tiny_model("qwen3_moe", experts_implementation="eager"))


def test_unknown_version(factory):
    model.disable()
    factory.model.loader.patch_config = lambda config: None
    with pytest.raises(RuntimeError, match=r"loader.patch_config of LLaMA-Factory 0.9.5 is not what"):
        model.enable()
    del factory.model.loader.init_adapter
    with pytest.raises(RuntimeError, match=r"loader.init_adapter of LLaMA-Factory 0.9.5 is missing"):
        places.require(factory.model.loader, "init_adapter")


def test_newer_versions_of_the_libraries_are_allowed(factory, monkeypatch, capsys):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "")

    def refuse():
        raise ImportError("transformers<=5.6.0 is required")

    monkeypatch.setattr(factory.extras.misc, "check_dependencies", refuse)
    llamafactory.allow_versions()
    assert os.environ["DISABLE_VERSION_CHECK"] == "1"
    assert "transformers<=5.6.0 is required" in capsys.readouterr().err


def test_the_training_loop_of_v1(factory):
    trainers = importlib.import_module("llamafactory.v1.core.base_trainer")
    v1.enable()
    v1.enable()
    try:
        trainer = trainers.BaseTrainer()
        trainer.model = tiny_model("qwen3_moe")
        with pytest.raises(RuntimeError, match="nothing of Qwen3MoeForCausalLM would run through ktops"):
            trainer.fit()
        assert not hasattr(trainer, "steps")
        ktops.swap_experts(trainer.model)
        trainer.fit()
        assert trainer.steps == 1
    finally:
        v1.disable()
