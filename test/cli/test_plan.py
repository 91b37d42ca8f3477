"""ktops plan: its numbers against models, files and steps that exist, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest
import torch
from model_files import save_model
from rich.console import Console
from transformers import AutoModelForCausalLM

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.stream import SafetensorsStream
from ktops.cli import models
from ktops.cli.errors import UserError
from ktops.cli.finetune import lora
from ktops.cli.finetune.options import Options, complete
from ktops.cli.finetune.report import Report
from ktops.cli.finetune.training import CHECKPOINTING
from ktops.cli.plan import needs as needs_module
from ktops.cli.plan.generation import CACHE, trace_generation
from ktops.cli.plan.machine import Memory
from ktops.cli.plan.needs import LIBRARIES, Needs, Planner
from ktops.cli.plan.report import verdict
from ktops.cli.plan.trace import Untraceable
from ktops.cli.plan.training import ADAPTERS, OPTIMIZER, trace_training
from ktops.cli.plan.weights import build, count, experts_bytes
from ktops.formats import ExpertWeight, names
from ktops.integrations.chunked_loss import chunk_loss
from ktops.integrations.lora_linear import adapters_in_input_dtype
from ktops.testing.counts import counted

MIB = 1 << 20
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}


@pytest.fixture(scope="session")
def wide_directory(tmp_path_factory, tokenizer):
    """A model whose rows of 256 weights every format can hold, in one file of float32."""
    directory = tmp_path_factory.mktemp("wide")
    save_model(directory, tokenizer, **WIDE)
    return directory


def run_options(directory, **given) -> Options:
    return complete(Options(model=str(directory), data="", **given))


def available(monkeypatch, nbytes: int) -> None:
    monkeypatch.setattr(needs_module, "read_memory", lambda: Memory(64 << 30, nbytes))


def trained_model(directory, options: Options):
    """Returns what `ktops finetune` trains."""
    model, _ = models.load_base(str(directory), options.torch_dtype, options)
    return lora.add_adapters(model, options, Report(Console(quiet=True)))


def test_parameters_and_bytes_are_those_of_the_model(model_directory):
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    attention = sum(p.numel() for layer in model.model.layers for p in layer.self_attn.parameters())
    found = count(
        build(str(model_directory), torch.bfloat16), str(model_directory), run_options(model_directory)
    )
    ends = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    assert found.parameters == {
        "experts": experts, "attention": attention, "embeddings": ends,
        "other": total - experts - attention - ends,
    }  # fmt: skip
    assert (found.experts, found.others) == (2 * experts, 2 * (total - experts))
    assert found.experts_format == "bf16" and found.architecture == type(model).__name__
    assert (found.experts_mapped, found.others_mapped) == (0, 0)  # the files hold float32
    assert found.disk == sum(file.stat().st_size for file in model_directory.glob("*.safetensors"))


@pytest.mark.parametrize("name", sorted(names(written=True)))
def test_bytes_of_a_format_are_those_of_quantized_experts(name, wide_directory):
    dense = build(str(wide_directory), torch.bfloat16).model.layers[0].mlp.experts
    weights = [
        ktops.quantize(torch.ones(1, *shape.shape[1:]), name)
        for shape in (dense.gate_up_proj, dense.down_proj)
    ]
    layers, experts = 2, dense.gate_up_proj.shape[0]
    expected = layers * experts * sum(weight.nbytes for weight in weights)
    assert experts_bytes(build(str(wide_directory), torch.bfloat16), name, None) == expected


def test_a_converted_directory_is_mapped(wide_directory, tmp_path, ktops_command):
    assert ktops_command("convert", wide_directory, tmp_path / "int8", "--weight-format", "int8")[0] == 0
    options = run_options(tmp_path / "int8")
    found = count(build(options.model, torch.float32), options.model, options)
    model, _ = models.load_base(options.model, torch.float32, replace(options, dtype="f32"))
    loaded = sum(module.nbytes for module in model.modules() if isinstance(module, ExpertWeight))
    assert found.experts_format == "int8"
    assert found.experts == found.experts_mapped == loaded
    assert found.others_mapped == found.others


@pytest.mark.parametrize("options", [("int8",), ("int4", "--group-size", 32)])
def test_what_convert_writes(wide_directory, tmp_path, ktops_command, options):
    arguments = ("--weight-format", *options)
    planned = json.loads(ktops_command("plan", wide_directory, *arguments, "--json")[1])["converted_bytes"]
    assert "as ktops convert writes it" in ktops_command("plan", wide_directory, *arguments)[1]
    assert ktops_command("convert", wide_directory, tmp_path / "out", *arguments)[0] == 0
    written = open_checkpoint(tmp_path / "out").tensors
    assert planned == sum(view.nbytes for name, view in written.items() if "_extra_state" not in name)
    assert json.loads(ktops_command("plan", wide_directory, "--json")[1])["converted_bytes"] is None


def test_dense_experts_are_mapped_only_if_they_lie_so(tmp_path):
    """transformers copies experts that are stored one by one; with mmap, ktops reads what it cannot map."""
    config = {
        "model_type": "qwen3_moe", "vocab_size": 304, "hidden_size": 64, "moe_intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
    }  # fmt: skip
    names = ("down_proj", "gate_proj", "up_proj")
    expert = "model.layers.0.mlp.experts.{}.{}.weight"
    orders = {
        "by expert": [expert.format(number, name) for number in range(4) for name in names],
        "by projection": [expert.format(number, name) for name in names for number in range(4)],
    }
    found = {}
    for order, tensors in orders.items():
        folder = tmp_path / order
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        kinds = dict.fromkeys(tensors, (torch.bfloat16, (64, 64)))
        with SafetensorsStream(folder / "model.safetensors", kinds) as stream:
            for name in tensors:
                stream.write(name, torch.ones(64, 64, dtype=torch.bfloat16))
        for mmap in (False, True):
            weights = count(build(str(folder), torch.bfloat16), str(folder), run_options(folder, mmap=mmap))
            found[order, mmap] = weights.experts_mapped / weights.experts
    assert found == {
        ("by expert", False): 0, ("by expert", True): 1,
        ("by projection", False): 0, ("by projection", True): pytest.approx(1 / 3),
    }  # fmt: skip


def test_linear_layers_in_int8(wide_directory):
    model, _ = models.load_base(str(wide_directory), torch.bfloat16, run_options(wide_directory))
    report = ktops.quantize_linear(model)

    def found(linear_format):
        skeleton = build(str(wide_directory), torch.bfloat16)
        return count(skeleton, str(wide_directory), run_options(wide_directory, linear_format=linear_format))

    saved = report.bytes_before - report.bytes_after
    assert found(None).others - found("int8").others == saved

    dense, int8 = (Planner(run_options(wide_directory, linear_format=name)) for name in (None, "int8"))
    for command in (Planner.finetune, Planner.chat):
        needs, smaller = (command(planner, planner.options).parts for planner in (dense, int8))
        assert needs["other weights"] - smaller["other weights"] == saved


def test_experts_of_a_config_alone(tmp_path, model_directory):
    config = json.loads((model_directory / "config.json").read_text())
    alone = tmp_path / "config.json"

    def found(quantization: dict | None, **given):
        alone.write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
        return count(build(str(alone), torch.bfloat16), str(alone), run_options(alone, **given))

    dense, fp8 = found(None), found({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert dense.experts_format == "bf16" and dense.disk == dense.experts + dense.others
    assert fp8.experts_format == "fp8_e4m3" and dense.experts / 2 < fp8.experts < dense.experts
    assert found({"quant_method": "gptq"}, weight_format="int8").experts_format == "int8"
    with pytest.raises(UserError, match=r"gptq, and no files .* --weight-format"):
        found({"quant_method": "gptq"})


SETTINGS = {
    "plain": {},
    "f32": {"dtype": "f32", "target": "experts", "lora_rank": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "attention": {"target": "attention"},
    "padded": {"packing": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_traced_step_allocates_what_a_step_does(name, wide_directory):
    """PyTorch's own count of a real step is the reference, beside what a step finds allocated."""
    options = run_options(wide_directory, **SETTINGS[name])
    shape = 4, 512
    traced = trace_training(build(options.model, options.torch_dtype), options, *shape)
    model = trained_model(wide_directory, options).train()
    chunk_loss(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step():
        ids = torch.ones(shape, dtype=torch.long)
        mask = None if options.packing else ids.clone()
        if mask is not None:
            mask[0, -1] = 0
        with adapters_in_input_dtype(model):
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    ktops.empty_cache()
    with counted() as counts:
        step()
    state = sum(t.nbytes for values in optimizer.state.values() for t in values.values())
    assert traced.parts[ADAPTERS] == sum(parameter.nbytes for parameter in trained)
    assert traced.parts[OPTIMIZER] == state
    during = sum(traced.parts.values()) - sum(traced.parts[key] for key in (ADAPTERS, OPTIMIZER, "scratch"))
    assert during == pytest.approx(counts.peak, rel=0.05)
    assert traced.experts[0] == (8, 2)
    scratch = ktops.memory_stats()["bytes_peak"]
    assert traced.parts["scratch"] < scratch < traced.parts["scratch"] + 8 * MIB * torch.get_num_threads()


def test_the_cache_of_a_conversation(model_directory):
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.ones(1, 48, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    traced = trace_generation(build(str(model_directory), torch.bfloat16), 48)
    assert traced.parts[CACHE] == held


def test_a_run_that_does_not_fit_is_refused_before_loading(
    ktops_command, wide_directory, data_file, monkeypatch, tmp_path
):
    available(monkeypatch, MIB)
    monkeypatch.setattr("ktops.cli.finetune.run.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
    arguments = (
        "finetune", "--model", wide_directory, "--data", data_file, "--max-length", 96, "--lora-rank", 4,
        "--eval-fraction", 0.2, "--output-dir", "out",
    )  # fmt: skip
    status, out, err = ktops_command(*arguments)
    assert status == 1 and "of memory are needed" in err and "are available" in err
    assert "No format of the experts, smaller batch" in err and "--force tries anyway" in err
    assert "plan: " in out and not (tmp_path / "out").exists()


def test_force_tries(ktops_command, reload_here, model_directory, data_file, monkeypatch):
    available(monkeypatch, 0)
    status, out, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--max-length", 96, "--max-steps", 1,
        "--eval-fraction", 0, "--force",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "--force: " in out and "adapter, metrics.json" in out


def test_a_model_that_cannot_be_traced_is_trained(
    ktops_command, reload_here, model_directory, data_file, monkeypatch
):
    def fail(*args):
        raise Untraceable("ValueError: it looks at values")

    monkeypatch.setattr(needs_module, "trace_training", fail)
    status, out, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--max-length", 96, "--max-steps", 1,
        "--eval-fraction", 0,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "no plan of the memory: ValueError: it looks at values" in out
    monkeypatch.setattr(needs_module, "trace_generation", fail)
    assert "cannot be planned: ValueError" in ktops_command("plan", model_directory)[2]


def test_the_first_change_that_fits(wide_directory, monkeypatch):
    options = run_options(wide_directory, max_length=256)
    planner = Planner(options)
    base = planner.finetune(options)

    def change(nbytes: int):
        available(monkeypatch, nbytes)
        found = Planner(options)
        return found.cheapest_change(found.finetune)

    own = base.anonymous - base.parts[LIBRARIES]
    assert change(own - MIB).text == "--weight-format int8"
    small = change(own - base.parts["experts in bf16"] - MIB)
    assert small.text.startswith("--batch-size") and small.needs.anonymous < base.anonymous
    assert change(MIB) is None


def test_mapped_files_need_not_fit_but_are_said_to_be_read_again():
    needs = Needs({"adapters": 10 * MIB, LIBRARIES: 300 * MIB}, {"experts in int4": 100 * MIB})
    assert verdict("chat", needs, Memory(64 << 30, 120 * MIB)) == "chat fits"
    assert "20.0 MiB of the mapped files do not stay" in verdict("chat", needs, Memory(64 << 30, 90 * MIB))
    assert "does not fit" in verdict("chat", needs, Memory(64 << 30, 9 * MIB))


def test_processes_share_only_what_is_mapped(ktops_command, wide_directory):
    """Each keeps its gradients, where they are exchanged, so there are no less than with accumulation."""
    assert ktops_command("convert", wide_directory, "int8", "--weight-format", "int8")[0] == 0
    plans = [
        json.loads(
            ktops_command("plan", "int8", "--batch-size", 1, "--max-length", 96, "--json", *options)[1]
        )
        for options in (["--gradient-accumulation-steps", 2], ["--processes", 3])
    ]
    one, three = (plan["finetune"] for plan in plans)
    assert three["mapped"] == one["mapped"] and one["mapped"]["experts in int8"] > 0
    assert three["parts"].keys() == one["parts"].keys()
    for name, size in three["parts"].items():
        assert size == 3 * one["parts"][name] or name == LIBRARIES
    assert plans[0]["chat"]["mapped"] == plans[1]["chat"]["mapped"]
    assert "3 x finetune, 4 x 96" in ktops_command("plan", "int8", "--max-length", 96, "--processes", 3)[1]


def test_one_process_instead_of_several_is_proposed(ktops_command, wide_directory, monkeypatch):
    available(monkeypatch, MIB)
    out = ktops_command("plan", wide_directory, "--processes", 2)[1]
    assert re.search(r"makes it fit. One process needs [\d.]+ [MG]iB\n", out)


def test_the_command(ktops_command, model_directory):
    status, out, err = ktops_command("plan", model_directory, "--max-length", 64, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan["finetune"]["fits"] and plan["chat"]["change"] is None
    assert plan["parameters"]["active"] < plan["parameters"]["total"]
    assert plan["finetune"]["anonymous_bytes"] == sum(plan["finetune"]["parts"].values())
    status, out, err = ktops_command("plan", model_directory, "--max-length", 64, "--weight-format", "int8")
    assert (status, err) == (0, "")
    assert "experts in int8" in out and "finetune fits" in out and "KV cache" in out


def test_options_of_the_training(ktops_command, model_directory):
    def parts(*options) -> dict[str, int]:
        status, out, err = ktops_command("plan", model_directory, "--max-length", 256, "--json", *options)
        assert (status, err) == (0, "")
        return json.loads(out)["finetune"]["parts"]

    plain = parts()
    assert parts("--freeze-experts")["adapters"] == parts("--target", "attention")["adapters"]
    assert parts("--freeze-experts")["adapters"] < plain["adapters"]
    assert parts("--no-packing")["saved activations"] > plain["saved activations"]
    assert parts("--gradient-accumulation-steps", 2)["gradients"] == plain["adapters"]
    assert "gradients" not in plain
    as_trained = ("--weight-format", "int8", "--quantize-method", "mse")
    assert ktops_command("plan", model_directory, *as_trained)[0] == 0


def test_the_command_refuses(ktops_command, tmp_path):
    assert ktops_command("plan", tmp_path)[::2] == (
        1,
        f"ktops: MODEL: no such file, or no config.json in it: {tmp_path}\n",
    )
    assert "--context must be positive" in ktops_command("plan", tmp_path, "--context", 0)[2]
