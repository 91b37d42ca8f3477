"""gpt-oss, as transformers writes it in bfloat16 and as it is published in MXFP4, compared with eager."""

import json

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_checkpoints import decode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.cli.convert import Options, convert
from ktops.integrations.peft import expert_target_parameters
from ktops.nn import KTExperts
from ktops.testing.budgets import model_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled")

BUDGET = model_budget(torch.float32, inner_size=64, num_operations=60)

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def config() -> transformers.GptOssConfig:
    return transformers.GptOssConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        initializer_range=0.2, pad_token_id=None, bos_token_id=1, eos_token_id=2, swiglu_limit=1.0,
        experts_implementation="eager",
    )  # fmt: skip


def random_model() -> transformers.GptOssForCausalLM:
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config())
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.bfloat16()


def write_mxfp4(path) -> None:
    """Writes the model with random blocks and scales in place of the experts' weights."""
    random_model().save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = tensors.pop(name).shape
        shape = num_experts, rows, columns // 32
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "quantization_config": MXFP4}))


WRITERS = {"bf16": lambda path: random_model().save_pretrained(path), "mxfp4": write_mxfp4}


@pytest.fixture(params=WRITERS)
def source(tmp_path, request):
    """The name of the format, and a directory in it."""
    WRITERS[request.param](tmp_path / "source")
    return request.param, tmp_path / "source"


def load(path, **options):
    model, info = transformers.GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values())
    return model.eval()


def eager(path):
    """Returns the model that transformers itself reads, which decodes MXFP4."""
    return load(path, experts_implementation="eager")


def loaded(path):
    return load(path, quantization_config=ktops.KTConfig())


def filled(path):
    """Returns another random model, filled by load_experts."""
    model = eager(path)
    for layer in model.model.layers:
        for parameter in layer.mlp.experts.parameters():
            torch.nn.init.zeros_(parameter)
    ktops.load_experts(model, path, show_progress=False)
    return model


def converted(path):
    destination = path.parent / "converted"
    convert(Options(path, destination, "fp32"), Console(quiet=True))
    return load(destination)


def experts(model) -> list[KTExperts]:
    found = [layer.mlp.experts for layer in model.model.layers]
    assert all(isinstance(module, KTExperts) for module in found)
    return found


@torch.no_grad()
def run(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits and 8 generated tokens, from products of the decoded weights."""
    for module in model.modules():
        if isinstance(module, KTExperts):
            module.compute = "bf16"
    ids = torch.arange(3, 25).reshape(2, 11)
    return model(input_ids=ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("way", [loaded, filled, converted])
def test_logits_and_tokens_equal_eager(source, way):
    name, path = source
    expected, tokens = run(eager(path))
    model = way(path)
    assert {module.function.gating for module in experts(model)} == {"interleaved"}
    assert {module.down_proj.format for module in experts(model)} == {"fp32" if way is converted else name}
    logits, generated = run(model)
    assert relative_error(logits, expected) < BUDGET
    assert torch.equal(generated, tokens)


def test_weights_are_those_that_transformers_decodes(source):
    """MXFP4 blocks are mapped; every weight equals what transformers computes from them, bit for bit."""
    name, path = source
    tensors = load_file(path / "model.safetensors")
    for layer in open_checkpoint(path).layers:
        read = layer.read(dtype=torch.float32)
        for key in ("gate_up_proj", "down_proj"):
            dense = tensors.get(f"{layer.name}.{key}")
            if dense is None:
                stored = (tensors[f"{layer.name}.{key}_{kind}"] for kind in ("blocks", "scales"))
                dense = convert_moe_packed_tensors(*stored, dtype=torch.float32)
            assert torch.equal(decode(getattr(read, key)), dense.mT.float())
            assert torch.equal(getattr(read, f"{key}_bias"), tensors[f"{layer.name}.{key}_bias"].float())
        mapped = layer.gate_up_proj.mapped + layer.down_proj.mapped
        assert mapped == (layer.nbytes if name == "mxfp4" else 0)


def test_report_of_convert(source):
    """Outputs are compared with the clamped activation of the model, not with silu."""
    _, path = source
    convert(Options(path, path.parent / "int8", "int8", report="full"), Console(quiet=True))
    report = json.loads((path.parent / "int8" / "ktops-report.json").read_text())
    assert (report["activation"], report["activation_note"]) == ("swiglu_clamped", None)
    layer, converted = (open_checkpoint(path.parent / name).layers[0] for name in (path.name, "int8"))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    outputs = [[], []]
    for expert in range(4):
        for weights, found in zip((converted.read(), layer.read()), outputs, strict=True):
            found.append(_eager_expert(x, weights, expert))
    ours, theirs = (torch.stack(found) for found in outputs)
    expected = ((ours - theirs).norm() / theirs.norm()).item()
    assert report["layers"][0]["output_error"] == pytest.approx(expected, rel=1e-3)


def _eager_expert(x, weights, expert: int) -> torch.Tensor:
    module = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(config())
    biases = weights.gate_up_proj_bias.float(), weights.down_proj_bias.float()
    gate_up = x @ decode(weights.gate_up_proj)[expert].T + biases[0][expert]
    return module._apply_gate(gate_up) @ decode(weights.down_proj)[expert].T + biases[1][expert]


def test_saved_and_loaded_again(source):
    _, path = source
    model = loaded(path)
    model.save_pretrained(path.parent / "saved")
    again = load(path.parent / "saved")
    for first, second in zip(experts(model), experts(again), strict=True):
        assert torch.equal(first.gate_up_proj.weight, second.gate_up_proj.weight)
        assert torch.equal(first.gate_up_proj_bias, second.gate_up_proj_bias)
    assert torch.equal(run(model)[0], run(again)[0])


def test_quantize_experts(source):
    """Quantizing a model in memory, and while loading, gives the same codes; bf16 is quantized in place."""
    _, path = source
    model = eager(path)
    dense = [layer.mlp.experts.gate_up_proj.detach().mT.clone() for layer in model.model.layers]
    ktops.quantize_experts(model, "int8", show_progress=False)
    other = load(path, quantization_config=ktops.KTConfig("int8"))
    for first, second, weight in zip(experts(model), experts(other), dense, strict=True):
        expected = ktops.quantize(weight.contiguous(), "int8")
        assert torch.equal(first.gate_up_proj.weight, expected.weight)
        assert torch.equal(second.gate_up_proj.weight, expected.weight)
    assert torch.equal(run(model)[0], run(other)[0])


def test_lora_is_saved_for_plain_peft(source, tmp_path):
    """Fine-tunes adapters on the experts as they are stored; plain PEFT computes the same with them."""
    _, path = source
    model = loaded(path)
    targets = expert_target_parameters(model)
    assert targets == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=4, target_parameters=targets, init_lora_weights=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(3, 25).reshape(2, 11)
    tuned(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tuned.save_pretrained(tmp_path / "adapter")
    logits, tokens = run(tuned.eval())
    ktops.disable()
    plain = peft.PeftModel.from_pretrained(eager(path), tmp_path / "adapter").eval()
    expected, expected_tokens = run(plain)
    assert relative_error(logits, expected) < BUDGET
    assert torch.equal(tokens, expected_tokens)
    with plain.disable_adapter():
        assert relative_error(run(plain)[0], expected) > 100 * BUDGET
