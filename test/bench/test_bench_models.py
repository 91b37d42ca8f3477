"""``bench.models make``: tiny models of every family, against transformers' own files and by loading them."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

import ktops
from bench.models import __main__ as models
from bench.models import finetune, layout, step
from bench.models.make import make
from ktops.cli.finetune import demo_model

SMALL = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 8,
    "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_group": 1, "topk_group": 1, "eos_token_id": 299, "bos_token_id": 298, "pad_token_id": None,
    "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
FAMILIES = ["deepseek-v2-lite", "deepseek-v3", "glm-4.5-air", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b"]
TOTALS = {  # billions of parameters, as published, without layers for multi-token prediction
    "deepseek-v2-lite": 15.7, "deepseek-v3": 671.0, "deepseek-v4-flash": 284.3, "deepseek-v4-pro": 1573.0,
    "glm-4.5-air": 106.9, "gpt-oss-120b": 116.8, "gpt-oss-20b": 20.9, "mixtral-8x7b": 46.7,
    "qwen3-235b-a22b": 235.1, "qwen3-30b-a3b": 30.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch, single_thread):
    """Trains tokenizers on little text."""
    monkeypatch.setattr("ktops.cli.finetune.demo_model.NUM_STORIES", 50)


def tiny(name: str, dtype: str | None = None) -> dict:
    """A configuration with the first two layers of a published one, narrow, with a small vocabulary."""
    config = layout.changed_config(layout.read_config(name), 2, dtype)
    small = {key: value for key, value in SMALL.items() if key in config and config[key] is not None}
    if "num_nextn_predict_layers" in config:
        small["num_nextn_predict_layers"] = 0
    return config | small


def stored(folder) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def experts_in_order(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return [name for name in opened.offset_keys() if ".experts." in name]


def load(folder, **options):
    """Loads the model by transformers, which must find every tensor and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_that_of_transformers(name, tmp_path):
    """Names, shapes and order are those that save_pretrained writes; ktops reads what transformers reads."""
    config = tiny(name, "bf16")
    make(config, tmp_path / "made")
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "made"))
    reference.save_pretrained(tmp_path / "saved")
    made, saved = stored(tmp_path / "made"), stored(tmp_path / "saved")
    assert {name: shape for name, (_, shape) in made.items()} == {
        name: shape for name, (_, shape) in saved.items()
    }
    assert experts_in_order(tmp_path / "made") == experts_in_order(tmp_path / "saved")
    assert {dtype for name, (dtype, _) in made.items() if "correction_bias" not in name} == {torch.bfloat16}
    expected = logits(load(tmp_path / "made"))
    assert 0.05 < expected.std() < 5
    ktops.enable()
    result = logits(load(tmp_path / "made", experts_implementation="ktops"))
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "qwen3-30b-a3b"])
def test_fp8_blocks(name, tmp_path):
    config = tiny(name, "fp8") | {"hidden_size": 256, "moe_intermediate_size": 128}
    make(config, tmp_path / "made")
    made = stored(tmp_path / "made")
    projection = "model.layers.1.mlp.experts.3.down_proj.weight"
    scales = torch.bfloat16 if "qwen" in name else torch.float32
    assert made[projection] == (torch.float8_e4m3fn, (256, 128))
    assert made[f"{projection}_scale_inv"] == (scales, (2, 1))
    assert made["model.layers.1.mlp.gate.weight"][0] == made["lm_head.weight"][0] == torch.bfloat16
    fp8 = FineGrainedFP8Config(dequantize=True)
    model = load(tmp_path / "made", quantization_config=fp8, dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.experts.down_proj.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.isfinite(logits(model)).all()
    (layer, *_) = ktops.checkpoints.open_checkpoint(tmp_path / "made").layers
    assert layer.read().down_proj.shape == (8, 256, 128)


def test_fp8_blocks_at_the_edges():
    tensors = layout.tensors(layout.changed_config(layout.read_config("deepseek-v3"), 4))
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (576, 7168)
    assert tensors[f"{name}_scale_inv"].shape == (5, 56)


def test_mxfp4_as_gpt_oss_is_published(tmp_path):
    make(tiny("gpt-oss-20b"), tmp_path / "made")
    made = stored(tmp_path / "made")
    experts = "model.layers.0.mlp.experts"
    assert made[f"{experts}.gate_up_proj_blocks"] == (torch.uint8, (8, 192, 2, 16))
    assert made[f"{experts}.down_proj_scales"] == (torch.uint8, (8, 64, 3))
    model = load(tmp_path / "made", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.experts.gate_up_proj.float().std().item() == pytest.approx(0.02, rel=0.2)


def test_deepseek_v4_has_its_own_names(tmp_path):
    config = tiny("deepseek-v4-flash") | {"num_key_value_heads": 1, "num_hidden_layers": 4}
    make(config | {"compress_ratios": [0, 0, 4, 128], "head_dim": 32}, tmp_path / "made")
    names = stored(tmp_path / "made").keys()
    assert {"embed.weight", "head.weight", "norm.weight", "layers.3.ffn.experts.7.w2.weight"} <= names
    assert torch.isfinite(logits(load(tmp_path / "made"))).all()


@pytest.mark.parametrize("name", sorted(TOTALS))
def test_the_number_of_parameters_is_the_published_one(name):
    config = layout.changed_config(layout.read_config(name), dtype="bf16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert model.num_parameters() / 1e9 == pytest.approx(TOTALS[name], abs=0.051)
    assert set(layout.NAMES) == TOTALS.keys()


def test_the_command_writes_shards_and_a_tokenizer(tmp_path, capsys):
    config, out = tmp_path / "config.json", tmp_path / "made"
    config.write_text(json.dumps(tiny("qwen3-30b-a3b") | {"vocab_size": 3000, "eos_token_id": 2990}))
    command = ["make", "--like", str(config), "--layers", "1", "--shard-size", "300KB", str(out)]
    assert models.main(command) == 0
    assert "1 layers" in capsys.readouterr().out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name for file in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert "model-00001-of-00003.safetensors" in files
    assert load(out).config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == tokenizer.vocab_size == 3000
    assert tokenizer.eos_token_id == 2990
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Who is Mara?"}], tokenize=False)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_layers_do_not_depend_on_their_number(tmp_path):
    config = tiny("qwen3-30b-a3b")
    make(layout.changed_config(config, 1), tmp_path / "one")
    make(config, tmp_path / "two")
    make(config, tmp_path / "other", seed=1)
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    one, two, other = (
        safe_open(tmp_path / folder / "model.safetensors", "pt").get_tensor(name)
        for folder in ("one", "two", "other")
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(8)]
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as opened:
        assert len({tuple(opened.get_tensor(name).flatten().tolist()) for name in names}) == 8


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("bench.models.make._write_tensor", fail)
    with pytest.raises(OSError, match="No space left"):
        make(tiny("qwen3-30b-a3b"), tmp_path / "made")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--like", "gpt5"], "like must be one of deepseek-v2-lite, .*; got 'gpt5'"),
        (["--like", "mixtral-8x7b", "--layers", "33"], "layers must be from 1 to 32, got 33"),
        (["--like", "mixtral-8x7b", "--dtype", "mxfp4"], "dtype must be bf16, .*, bf16; got mxfp4"),
        (["--like", "gpt-oss-20b", "--dtype", "fp8"], "dtype must be bf16, .*, mxfp4; got fp8"),
        (["--like", "mixtral-8x7b"], "already exists"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    assert models.main(["make", *options, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "qwen3-30b-a3b"])
def test_the_matrix_products_of_a_step(name, tmp_path):
    """A model without experts has these FLOPs, and attention's masked half, by PyTorch's count."""
    dense = {"first_k_dense_replace": 2, "mlp_only_layers": [0, 1]}
    make(tiny(name) | dense, tmp_path / "made")
    flops = step.matrix_products(tmp_path / "made", 24, rank=0)
    model = load(tmp_path / "made", attn_implementation="eager").requires_grad_(False)
    embeddings = model.get_input_embeddings()(torch.arange(24)[None]).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert counter.get_total_flops() == flops["linear"] + flops["head"] + 2 * flops["attention"]
    with_rank = step.matrix_products(tmp_path / "made", 24, rank=3)
    size = sum(sum(m.weight.shape) for n, m in model.named_modules() if re.search(r"attn.*_proj", n))
    assert with_rank == flops | {"adapters": 6 * 24 * 3 * size}


def test_a_step_is_compared_with_its_parts(tmp_path):
    """The first step, and the product after it, do not count."""
    ops = {"moe_sft_fwd": {"calls": 8, "seconds": 4.0}, "moe_sft_bwd": {"calls": 8, "seconds": 8.0}}
    metrics = {"steps": [{"seconds": s} for s in (99.0, 10.0, 12.0, 11.0)], "kt_time": {"ops": ops}}
    large = 2 * 4096**3
    run = finetune.Run(metrics, [99.0, 1.0, 2.0, 3.0])
    row = step.figures(run, {"linear": large, "head": large / 4})
    assert row == {"step": 11.0, "kt ops": 3.0, "linear": 2.0, "head": 0.5, "step / parts": 2.0}
    finetune.write_data(tmp_path / "data.jsonl", 100, 3)
    texts = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(set(texts)) == 3
    assert all(len(ids) >= 100 for ids in demo_model.make_tokenizer()[1](texts)["input_ids"])
