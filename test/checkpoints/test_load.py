"""load_experts: logits are those of the intended weights, and an error leaves the model unchanged."""

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import OneLayer, decode, expect_equal, write_gguf, write_per_expert
from tiny_schemes import SCHEMES, plain

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

E, H, I = 4, 64, 96  # noqa: E741
BUDGET = 1e-5
SIZES = {"num_experts": E, "hidden": H, "intermediate": I}


def config() -> transformers.Qwen3MoeConfig:
    return transformers.Qwen3MoeConfig(
        vocab_size=61, hidden_size=H, intermediate_size=80, moe_intermediate_size=I, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=E, num_experts_per_tok=2,
        norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip


def tiny_model(dense=None) -> transformers.Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config()).eval()
    for layer, weights in zip(model.model.layers, dense or [], strict=dense is not None):
        layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data = weights
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Uses products of the decoded weights, because int8 products round the activations."""
    for module in model.modules():
        if isinstance(module, KTExperts):
            module.compute = "bf16"
    return model(input_ids=torch.arange(2 * 11).reshape(2, 11)).logits


def small(make):
    """Returns the tensors with smaller numbers, like the weights of a model."""

    def made(rng, rows, columns):
        tensors, dense = make(rng, rows, columns)
        for name, tensor in tensors.items():
            if "scale" in name:
                if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
                    tensors[name] = torch.full_like(tensor.view(torch.uint8), 120)
                else:
                    tensors[name] = tensor * 0 + 2.0**-11
        return tensors, dense

    return made


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
def test_logits(tmp_path, scheme):
    make, name = SCHEMES[scheme]
    write_per_expert(tmp_path, small(make), **SIZES)
    model = tiny_model()
    report = ktops.load_experts(model, tmp_path, show_progress=False)
    dense = []
    for layer in model.model.layers:
        assert isinstance(layer.mlp.experts, KTExperts) and not layer.mlp.experts.training
        weights = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        assert {weight.format for weight in weights} == {name}
        assert {weight.dtype for weight in weights} == {torch.float32}
        dense.append(tuple(decode(weight) for weight in weights))
    assert relative_error(logits(model), logits(tiny_model(dense))) < BUDGET
    assert relative_error(logits(tiny_model()), logits(model)) > 100 * BUDGET
    assert report.layers == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert report.formats == {(name, name): 2}
    assert report.nbytes == sum(w.nbytes for w in model.modules() if isinstance(w, ktops.ExpertWeight))


@pytest.mark.parametrize("scheme", ["bf16", "fp8 blocks", "gptq act-order"])
def test_quantized_on_the_way(tmp_path, scheme):
    make, _ = SCHEMES[scheme]
    dense = write_per_expert(tmp_path, make, **SIZES)
    model = tiny_model().bfloat16()
    report = ktops.load_experts(model, tmp_path, "int4", group_size=32, show_progress=False)
    assert report.formats == {("int4", "int4"): 2} and report.mapped == 0
    for layer, weights in zip(model.model.layers, dense, strict=True):
        for weight, reference in zip(
            (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj), weights, strict=True
        ):
            expected = ktops.quantize(reference, "int4", group_size=32)
            assert torch.equal(weight.weight, expected.weight) and torch.equal(weight.scale, expected.scale)
            assert weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_lists_of_experts(tmp_path):
    """A ModuleList is filled like stacked experts, and can still be indexed."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES)
    model, stacked = tiny_model(), tiny_model()
    for layer in model.model.layers:
        experts = [Qwen3MoeMLP(model.config, SIZES["intermediate"]) for _ in range(SIZES["num_experts"])]
        layer.mlp.experts = torch.nn.ModuleList(experts)
    before = snapshot(model)
    with pytest.raises(ValueError, match="method must be one of"):
        ktops.load_experts(model, tmp_path, "int8", method="best")
    assert snapshot(model) == before
    for each in (model, stacked):
        report = ktops.load_experts(each, tmp_path, "int8", show_progress=False)
        assert report.layers == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert torch.equal(logits(model), logits(stacked))
    experts = model.model.layers[1].mlp.experts
    x, ids = torch.randn(3, 64), torch.full((3, 1), 2)
    expected = stacked.model.layers[1].mlp.experts(x, ids, torch.ones(3, 1))
    assert torch.equal(experts[2](x), expected) and len(list(experts)) == len(experts)


def test_own_directory_is_mapped(tmp_path):
    (tmp_path / "source").mkdir()
    write_per_expert(tmp_path / "source", plain(torch.bfloat16), **SIZES)
    writer = ktops.checkpoints.CheckpointWriter(tmp_path / "target")
    for layer in open_checkpoint(tmp_path / "source").layers:
        writer.write_layer(layer.name, *layer.experts("int8"))
    writer.finish()
    model, other = tiny_model(), tiny_model()
    report = ktops.load_experts(model, tmp_path / "target", show_progress=False)
    assert report.mapped == report.nbytes > 0
    assert "of which" in str(report) and "int8" in str(report)
    ktops.load_experts(other, tmp_path / "source", "int8", show_progress=False)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize(("gate_up", "down"), [("Q8_0", "Q8_0"), ("Q4_0", "Q5_1"), ("F16", "BF16")])
def test_gguf(tmp_path, gate_up, down):
    """Compares blocks written by the gguf package with the weights that it decodes."""
    rng, tensors, dense = numpy.random.default_rng(0), {}, []
    for layer in range(2):
        decoded = {}
        for name, shape in (("gate", (E, I, H)), ("up", (E, I, H)), ("down", (E, H, I))):
            kind = gguf.GGMLQuantizationType[down if name == "down" else gate_up]
            blocks = gguf.quantize(rng.normal(0, 0.1, shape).astype(numpy.float32), kind)
            tensors[f"blk.{layer}.ffn_{name}_exps.weight"] = blocks, kind
            decoded[name] = torch.from_numpy(gguf.dequantize(blocks, kind).astype(numpy.float32))
        dense.append((torch.cat([decoded["gate"], decoded["up"]], 1), decoded["down"]))
    write_gguf(tmp_path / "model.gguf", tensors)
    model = tiny_model()
    report = ktops.load_experts(model, tmp_path / "model.gguf", show_progress=False)
    down_bytes = sum(layer.mlp.experts.down_proj.nbytes for layer in model.model.layers)
    assert report.mapped == down_bytes
    assert relative_error(logits(model), logits(tiny_model(dense))) < BUDGET


def test_experts_on_meta(tmp_path):
    write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES)
    model, other = tiny_model(), tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts.to("meta")
    for loaded in (model, other):
        ktops.load_experts(loaded, tmp_path, show_progress=False)
    assert torch.equal(logits(model), logits(other))


def test_layers_of_other_parts_are_told_apart_by_name(tmp_path):
    """Uses a checkpoint with a multi-token predictor, whose layers are also numbered from zero."""
    dense = write_per_expert(tmp_path, plain(torch.float32), **SIZES)
    tensors = load_file(tmp_path / "model-00001-of-00002.safetensors")
    mine = {f"draft.{name[6:]}": tensor + 1 for name, tensor in tensors.items() if name.startswith("model.")}
    save_file({**tensors, **mine}, tmp_path / "model-00001-of-00002.safetensors")
    assert [layer.index for layer in open_checkpoint(tmp_path).layers] == [0, 0, 1]
    model = tiny_model()
    ktops.load_experts(model, tmp_path, show_progress=False)
    assert torch.equal(decode(model.model.layers[0].mlp.experts.gate_up_proj), dense[0][0])


def test_biases_that_the_file_lacks(tmp_path):
    write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES)
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts = KTExperts(E, H, I, bias=True)
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj of model.layers.0.mlp.experts has a bias in the mo"
    ):
        ktops.load_experts(model, tmp_path)


@pytest.mark.parametrize(
    ("gating", "missing", "message"),
    [
        ("none", (), r"experts.0.gate_proj.weight in .*: the experts of the model have no gate projection"),
        ("concatenated", ("gate_proj",), r"mlp.experts: the gate projection of the experts is missing"),
        ("none", ("gate_proj", "up_proj"), r"mlp.experts: the up projection of the experts is missing"),
    ],
)
def test_gate_that_only_the_model_or_the_file_has(tmp_path, gating, missing, message):
    write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES, layers=1)
    path = tmp_path / "model-00001-of-00001.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not any(f".{name}." in n for name in missing)}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=message):
        ktops.load_experts(OneLayer(E, H, I, gating=gating), tmp_path)


def test_experts_without_gate(tmp_path):
    """The file alone tells that there is no gate."""
    dense = write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES, layers=1)
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file({n: t for n, t in load_file(path).items() if ".gate_proj." not in n}, path)
    (layer,) = open_checkpoint(tmp_path).layers
    assert (layer.gating, layer.num_experts, layer.hidden_size, layer.intermediate_size) == ("none", E, H, I)
    expect_equal(layer, dense[0][0][:, I:], dense[0][1])
    model = OneLayer(E, H, I, gating="none", activation="relu2")
    ktops.load_experts(model, tmp_path)
    experts = model.model.layers[0].mlp.experts
    assert experts.function == ("relu2", (), "none")
    assert torch.equal(decode(experts.up_proj), dense[0][0][:, I:])


def snapshot(model) -> dict:
    return {name: (id(m), dict(m._parameters)) for name, m in model.named_modules()}


FAULTS = {
    "no directory": (lambda folder: folder / "nothing", r"nothing: no such file or directory"),
    "missing layer": (
        lambda folder: (
            (folder / "model-00002-of-00002.safetensors").unlink()
            or (folder / "model.safetensors.index.json").unlink()
        ),
        r"layers.1.mlp.experts: the experts of layer 1 are missing in .*, which has .* model.layers.\{0\}",
    ),
    "missing file": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002.safetensors: cannot be read: .*No such file",
    ),
    "missing tensor": (
        lambda folder: edit(folder, lambda t: t.pop(f"{PREFIX}.2.up_proj.weight")),
        r"model.layers.1.mlp.experts.2.up_proj.weight is missing in .*00002.safetensors; other experts have",
    ),
    "missing projection": (
        lambda folder: edit(
            folder, lambda t: [t.pop(f"{PREFIX}.2.up_proj.weight{end}") for end in ("", "_scale_inv")]
        ),
        r"model.layers.1.mlp.experts.2: the up projection is missing in .*experts.3.up_proj.weight",
    ),
    "missing scale": (
        lambda folder: edit(folder, lambda t: t.pop(f"{PREFIX}.2.up_proj.weight_scale_inv")),
        r"experts.2.up_proj.weight_scale_inv is missing in .*00002.safetensors; other experts have it",
    ),
    "wrong shape": (
        lambda folder: edit(folder, lambda t: replace(t, "2.up_proj.weight", lambda w: w[:, 1:])),
        r"experts.2.up_proj.weight in .*00002.safetensors: expert 2 differs from expert 0: .*\[96, 63\]",
    ),
    "wrong dtype": (
        lambda folder: edit(folder, lambda t: replace(t, "2.up_proj.weight", lambda w: w.view(torch.uint8))),
        r"experts.2.up_proj.weight in .*00002.safetensors: unknown scheme: torch.uint8 with a scale",
    ),
    "wrong shape of a scale": (
        lambda folder: edit(
            folder, lambda t: replace(t, "2.up_proj.weight_scale_inv", lambda w: w.repeat(2, 2))
        ),
        r"experts.2.up_proj.weight_scale_inv in .*: must have shape \[1, 1\], got \[2, 2\]",
    ),
    "truncated": (
        lambda folder: cut(folder / "model-00002-of-00002.safetensors"),
        r"in .*00002.safetensors: truncated: the tensor ends at byte",
    ),
    "biases that the model lacks": (
        lambda folder: edit(
            folder, lambda t: t.update({f"{PREFIX}.{e}.down_proj.bias": torch.ones(H) for e in range(E)})
        ),
        r"down_proj of model.layers.1.mlp.experts has no bias in the model, but a bias in the checkpoint",
    ),
    "another tensor": (
        lambda folder: edit(
            folder,
            lambda t: t.update(
                {f"{PREFIX}.{e}.{p}_proj.secret": torch.ones(1) for e in range(E) for p in ("gate", "up")}
            ),
        ),
        r"experts.0.gate_proj.secret in .*: unknown scheme: ktops does not know what secret mean",
    ),
}
PREFIX = "model.layers.1.mlp.experts"


def edit(folder, change) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors["x"] = torch.zeros(3)
    change(tensors)
    save_file(tensors, path)


def replace(tensors, name, change) -> None:
    tensors[f"{PREFIX}.{name}"] = change(tensors[f"{PREFIX}.{name}"]).contiguous()


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_error_leaves_the_model_as_it_was(tmp_path, fault):
    make, _ = SCHEMES["fp8 blocks"]
    write_per_expert(tmp_path, make, **SIZES)
    model = tiny_model()
    before, change, message = snapshot(model), *FAULTS[fault]
    path = change(tmp_path) or tmp_path
    with pytest.raises(CheckpointError, match=message):
        ktops.load_experts(model, path, show_progress=False)
    assert snapshot(model) == before


def test_error_while_reading_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    write_per_expert(tmp_path, plain(torch.float32), **SIZES)
    model = tiny_model()
    before, calls = snapshot(model), []
    read = ktops.checkpoints.view.TensorFile.read

    def failing(self, offset, memory):
        calls.append(offset)
        if len(memory) > 1000 and len(calls) > 20:
            raise OSError("the disk is gone")
        return read(self, offset, memory)

    monkeypatch.setattr(ktops.checkpoints.view.TensorFile, "read", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        ktops.load_experts(model, tmp_path, show_progress=False)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "int5"}, "format must be one of bf16, .*, got 'int5'"),
        ({"weight_format": "int4", "group_size": 33}, "group_size must be one of .*, got 33"),
        ({"weight_format": "int4", "method": "best"}, "method must be one of rtn, mse"),
        ({"weight_format": "q4_k"}, "q4_k' needs rows of a multiple of 256 weights, got 64"),
    ],
)
def test_options(tmp_path, options, message):
    write_per_expert(tmp_path, plain(torch.bfloat16), **SIZES)
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"load_experts: model.layers.0.mlp.experts: .*{message}"):
        ktops.load_experts(model, tmp_path, **options)
    assert snapshot(model) == before


def test_models_that_cannot_be_filled(tmp_path):
    write_per_expert(tmp_path, plain(torch.bfloat16), **{**SIZES, "num_experts": 3})
    with pytest.raises(
        ValueError, match="load_experts: model must have Mixture-of-Experts layers, got Linear"
    ):
        ktops.load_experts(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(CheckpointError, match=r"= \[4, 64, 96\], the checkpoint \[3, 64, 96\]"):
        ktops.load_experts(tiny_model(), tmp_path)
    model = tiny_model()
    model.model.layers[0].mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"cannot load model.layers.0.mlp.experts, .* no activation Tanh"):
        ktops.load_experts(model, tmp_path)
    model = tiny_model()
    model.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"cannot load model.layers.1.mlp.experts, a list of 1 modules"):
        ktops.load_experts(model, tmp_path)


def test_lora_trains_on_what_is_loaded(tmp_path):
    """Adapters are added after loading; the first step of training changes them."""
    import peft

    make, _ = SCHEMES["pack-quantized"]
    write_per_expert(tmp_path, small(make), **SIZES)
    model = tiny_model()
    ktops.load_experts(model, tmp_path, show_progress=False)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    try:
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], target_parameters=targets)
        )
        ids = torch.arange(2 * 11).reshape(2, 11)
        model(input_ids=ids, labels=ids).loss.backward()
    finally:
        ktops.disable()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "experts" in n}
    assert len(grads) == 8
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora_B" in name)
    with pytest.raises(ValueError, match="load the experts before adding adapters"):
        ktops.load_experts(model, tmp_path)
