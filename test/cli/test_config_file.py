"""Configuration files with LLaMA-Factory's keys: what they set, and which mistakes are found."""

import re
from pathlib import Path

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.config_file import read_config
from ktops.cli.finetune.config_keys import KEYS
from ktops.cli.finetune.yaml_file import read_yaml

FULL = """
### model
model_name_or_path: deepseek-ai/DeepSeek-V2-Lite-Chat
trust_remote_code: true
torch_dtype: bfloat16

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_alpha: 32.0
lora_dropout: 0.05
lora_target: [q_proj, gate_proj]

### ktransformers
use_kt: true
kt_backend: AMXInt8
kt_num_threads: 60
kt_tp_enabled: true
kt_num_gpu_experts: 0

### dataset
dataset: identity, alpaca_en_demo
template: deepseek
cutoff_len: 512
max_samples: 1000
preprocessing_num_workers: 16

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 2.0
max_steps: -1
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### eval
val_size: 0.1
per_device_eval_batch_size: 2
eval_strategy: steps
eval_steps: 100

### output
output_dir: saves/deepseek
logging_steps: 10
save_steps: 200
save_total_limit: 3
plot_loss: true
overwrite_output_dir: true
report_to: none
resume_from_checkpoint: null
"""


FP8 = {"weight_format": "fp8_e4m3", "group_size": 128}


@pytest.fixture
def config(tmp_path):
    """Returns ``read(text)``, which reads the text as a configuration file."""

    def read(text: str):
        (tmp_path / "config.yaml").write_text(text)
        return read_config(tmp_path / "config.yaml")

    return read


def test_every_usual_key(config):
    read = config(FULL)
    assert read.options == {
        "model": "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "dtype": "bf16",
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "target": "q_proj,gate_proj",
        "weight_format": "int8",
        "group_size": 0,
        "num_threads": 60,
        "data": "identity, alpaca_en_demo",
        "max_length": 512,
        "max_samples": 1000,
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "epochs": 2.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "eval_fraction": 0.1,
        "eval_batch_size": 2,
        "eval_steps": 100,
        "output_dir": "saves/deepseek",
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 3,
        "overwrite": True,
        "seed": 42,
    }
    assert read.notes == (
        "template deepseek: the chat template of the model's tokenizer is used instead",
        "without effect in ktops finetune: trust_remote_code, preprocessing_num_workers, ddp_timeout, "
        "plot_loss, kt_num_gpu_experts, kt_tp_enabled",
    )


def test_keys_left_out_have_llamafactorys_defaults(config):
    options = config("model_name_or_path: m\ndataset: d").options
    assert (options["lora_rank"], options["target"], options["max_length"]) == (8, "all", 2048)
    assert (options["lr_scheduler"], options["learning_rate"], options["batch_size"]) == ("linear", 5e-5, 8)
    assert options["eval_fraction"] == 0 and options["save_total_limit"] is None


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("val_size: 30", {"eval_examples": 30}),
        ("eval_dataset: other", {"eval_data": "other"}),
        ("warmup_steps: 0.2", {"warmup_ratio": 0.2}),
        ("warmup_steps: 20", {"warmup_steps": 20}),
        ("bf16: false", {"dtype": "f32"}),
        ("torch_dtype: float32", {"dtype": "f32"}),
        ("max_steps: 5", {"max_steps": 5}),
        ("eval_steps: 5", {}),
        ("resume_from_checkpoint: true\noverwrite_output_dir: true", {"resume": True}),
        ("use_kt: false\nkt_backend: AMXBF16", {"experts_implementation": "grouped_mm"}),
        (
            "use_kt: true\nkt_backend: amxint4_KGROUP_sft_skiplora",
            {"weight_format": "int4", "freeze_experts": True},
        ),
        ("kt_num_threads: 4", {"num_threads": 4}),
        ("device: cuda\nkt_num_gpu_experts: 4", {"device": "cuda", "num_gpu_experts": 4}),
        ("kt_num_gpu_experts: 4", {}),
        (
            "weight_format: q4_0\nignore_keys: [id, source]",
            {"weight_format": "q4_0", "ignore_keys": "id,source"},
        ),
        ("kt_config: {kt_backend: FP8, kt_num_threads: 2}", {**FP8, "num_threads": 2}),
        ("kt_expert_weight_format: int8", {"weight_format": "int8", "group_size": 0}),
    ],
)
def test_values(config, text, options):
    defaults = config("dataset: d").options
    read = config(text + "\ndataset: d").options
    assert dict(read.items() - defaults.items()) == options
    assert ("eval_fraction" in read) != bool({"eval_examples", "eval_data"} & options.keys())


def test_experts_on_a_device_need_one(config):
    idle = ("without effect in ktops finetune: kt_num_gpu_experts",)
    assert config("kt_num_gpu_experts: 4\ndevice: cpu").notes == idle
    assert config("kt_num_gpu_experts: 4\ndevice: cuda").notes == ()


def test_transformers_instead_of_ktops_is_told(config):
    notes = config("use_kt: false\nkt_backend: AMXBF16").notes
    assert notes == (
        "use_kt: false: transformers runs the experts (grouped_mm), not ktops",
        "without effect in ktops finetune: kt_backend",
    )


def test_command_line_overrides_the_file(config):
    read = config("max_steps: 5\nwarmup_steps: 2\nval_size: 0.1\nuse_kt: true\nkt_backend: AMXInt8\nseed: 1")
    assert read.with_command_line({"seed": 2})["seed"] == 2
    assert "max_steps" not in read.with_command_line({"epochs": 1.0})
    assert "warmup_steps" not in read.with_command_line({"warmup_ratio": 0.1})
    assert "eval_fraction" not in read.with_command_line({"eval_data": "x"})
    options = read.with_command_line({"weight_format": "int4"})
    assert options["weight_format"] == "int4" and "group_size" not in options


def test_errors_name_the_key_of_an_option(config, tmp_path):
    read = config("\nlora_rank: -1\nlearning_rate: 1")
    message = read.explain("--lora-rank must be positive; --lora-rank-pattern too", {})
    assert message.endswith(f"too\n  --lora-rank is lora_rank in {tmp_path / 'config.yaml'}, line 2")
    assert read.explain("--lora-rank must be positive", {"lora_rank": -1}) == "--lora-rank must be positive"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nlora_rnk: 8",
            "line 1: unknown key a. docs/cli.md lists the keys; LLaMA-Factory itself takes others: ktops la",
        ),
        ("seed: 1\nlora_rnk: 8", "line 2: unknown key lora_rnk. Did you mean lora_rank?"),
        ("uses_kt: true", "line 1: unknown key uses_kt. Did you mean use_kt?"),
        (
            "use_kt: true\nkt_backend: INT8\nkt_bakend: INT8",
            "line 3: unknown key kt_bakend. Did you mean kt_b",
        ),
        ("lora_rank: eight", "line 1: lora_rank is 'eight': expected a whole number"),
        ("lora_rank: 1.5", "line 1: lora_rank is 1.5: expected a whole number"),
        ("lora_rank: .inf", "line 1: lora_rank is inf: expected a whole number"),
        ("lora_rank: true", "line 1: lora_rank is true: expected a whole number"),
        ("learning_rate: '1e-4'", "line 1: learning_rate is '1e-4': expected a number"),
        ("output_dir: 3", "line 1: output_dir is 3: expected text"),
        ("dataset: [a, 1]", "line 1: dataset is ['a', 1]: expected names"),
        ("overwrite_output_dir: 1", "line 1: overwrite_output_dir is 1: expected true or false"),
        (
            "stage: dpo",
            "stage is 'dpo': ktops finetune does not do that; for other stages and methods: ktops la",
        ),
        ("finetuning_type: full", "finetuning_type is 'full': ktops finetune does not do that"),
        ("do_train: false", "do_train is false: ktops finetune does not do that"),
        ("fp16: true", "fp16 is true: ktops finetune does not do that; it trains in bf16 or f32"),
        ("torch_dtype: float16", "torch_dtype is 'float16': expected auto, bfloat16 or float32"),
        ("report_to: wandb", "report_to is 'wandb': ktops finetune reports to metrics.json"),
        ("packing: true", "packing is true: ktops finetune does not do that; ktops launch llamafactory-cli"),
        ("eval_strategy: epoch", "eval_strategy is 'epoch': ktops finetune does not do that; use steps"),
        ("eval_strategy: steps", "line 1: eval_strategy: steps needs eval_steps"),
        ("torch_dtype: float32\nbf16: true", "line 2: bf16 contradicts torch_dtype in line 1"),
        (
            "kt_backend: AMXInt8\nweight_format: int4",
            "line 2: weight_format contradicts kt_backend in line 1",
        ),
        ("kt_backend: AMXInt9", "line 1: kt_backend must be one of auto,"),
        ("seed: 1\nkt_num_threads: many", "line 2: kt_num_threads must be a positive integer, got 'many'"),
        ("kt_weight_path: nowhere", "line 1: kt_weight_path must name a checkpoint"),
        ("kt_use_lora_experts: true", "line 1: kt_use_lora_experts must be absent, got True"),
    ],
)
def test_wrong_keys_and_values(config, text, message):
    with pytest.raises(UserError) as error:
        config(text)
    assert "config.yaml, line " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.yaml is empty"),
        (b"# nothing", "x.yaml is empty"),
        (b"- a", "x.yaml: expected keys and values, such as `lora_rank: 8`, got a sequence"),
        (b"a: 1\nb: c: d", "x.yaml, line 2: not valid YAML (mapping values are not allowed here)"),
        (b"a: [1", "x.yaml, line 1: not valid YAML"),
        (b"a: 1\n\nb: 2\na: 3", "x.yaml, line 4: the key a is given twice"),
        (b"a: {x: 1, x: 2}", "x.yaml, line 1: the key x is given twice"),
        (b"a: 1\nb: 2024-99-99", "x.yaml, line 2: b has no valid value (month"),
        (b"a: !!python/name:os.system x", "x.yaml, line 1: a has no valid value"),
        (b"a: 1\n---\nb: 2", "x.yaml, line 2: not valid YAML"),
        (b"a: &x [*x]", "x.yaml: not valid YAML (maximum recursion depth"),
        (b"a: \xff", "x.yaml: not UTF-8 (invalid start byte at byte 3)"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "x.yaml")
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_numbers_and_words_of_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("\ufeffa: 1e-4\nb: -2.5E+3\nc: yes\nd: '1e-4'\ne: 1e\nf: null\ng: 0.1")
    values = {key: entry.value for key, entry in read_yaml(tmp_path / "x.yaml").items()}
    assert values == {"a": 1e-4, "b": -2500.0, "c": True, "d": "1e-4", "e": "1e", "f": None, "g": 0.1}


def test_the_page_lists_every_key():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    listed = set(re.findall(r"`(\w+)`", page))
    assert not KEYS.keys() - listed
