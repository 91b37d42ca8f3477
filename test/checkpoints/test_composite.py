"""If layers of a checkpoint share a number, the right one is the layer that transformers would load."""

import numpy
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_checkpoints import expect_equal, write_gguf, write_per_expert
from tiny_composites import SAVED, omni, qwen3_5, save
from tiny_schemes import SCHEMES

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.checkpoints.match import match_layers
from ktops.checkpoints.names import family
from ktops.cli.convert import Options, convert
from ktops.cli.models import load_model, quantize_experts
from ktops.compat import KTMoEWrapper
from ktops.nn import KTExperts

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.fixture(params=SAVED)
def saved(request, tmp_path):
    """Returns the directory of a checkpoint and the class to load it with."""
    return tmp_path / "saved", save(request.param, tmp_path / "saved")


def load(model_class, path, **options):
    """Returns the model. Nothing is missing and, with a ktops loader, no experts are left over."""
    model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    left = info.pop("unexpected_keys")
    assert not any(info.values()), info
    if any(isinstance(module, KTExperts) for module in model.modules()):
        assert not [name for name in left if "expert" in name and "shared" not in name]
    return model


def experts(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def expect_experts(model, reference) -> None:
    """Every layer has the experts of the reference, in int8."""
    found, expected = experts(model), experts(reference)
    assert found.keys() == expected.keys() and found
    for name, module in found.items():
        assert isinstance(module, KTExperts)
        for weight in ("gate_up_proj", "down_proj"):
            dense = getattr(expected[name], weight).detach()
            assert torch.equal(getattr(module, weight).weight, ktops.quantize(dense, "int8").weight), name


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_load_experts(saved, kind):
    path, model_class = saved
    model, reference = load(model_class, path), load(model_class, path)
    given = path if kind == "directory" else path / "model.safetensors"
    ktops.load_experts(model, given, "int8", show_progress=False)
    expect_experts(model, reference)


def test_from_pretrained(saved):
    path, model_class = saved
    expect_experts(
        load(model_class, path, quantization_config=ktops.KTConfig("int8")), load(model_class, path)
    )


def test_convert(saved, tmp_path):
    """MTP layers are converted too, and from_pretrained skips them as in the source."""
    path, model_class = saved
    convert(Options(path, tmp_path / "converted", "int8"), Console(quiet=True))
    reference = load(model_class, path)
    expect_experts(load(model_class, tmp_path / "converted"), reference)
    model = load(model_class, path)
    ktops.load_experts(model, tmp_path / "converted", show_progress=False)
    expect_experts(model, reference)
    layers = open_checkpoint(path).layers
    assert [layer.module for layer in open_checkpoint(tmp_path / "converted").layers] == [
        layer.module for layer in layers
    ]


@pytest.fixture(scope="module")
def parts():
    """Loads a thinker and a text model, whose layers have longer names in the whole checkpoint."""
    text = qwen3_5().config.text_config
    return {"thinker": omni().thinker, "vision": transformers.Qwen3_5MoeForCausalLM(text)}


@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
@pytest.mark.parametrize("names", ["thinker", "vision"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_of_a_part(tmp_path, parts, scheme, names):
    """Names of scales, codes and zero points are mapped like those of their weights."""
    dense = write_per_expert(tmp_path, SCHEMES[scheme][0], names=names)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        start = family(next(name for name in tensors if "experts" in name).partition(".mlp")[0])
        others = {
            name.replace(start, "mtp.layers."): t.clone() for name, t in tensors.items() if start in name
        }
        save_file(tensors | others, file)
    (tmp_path / "model.safetensors.index.json").unlink()
    modules = experts(parts[names])
    layers = match_layers(open_checkpoint(tmp_path), parts[names], modules)
    for name, weights in zip(modules, dense, strict=True):
        assert layers[name].name.startswith(start)
        expect_equal(layers[name], *weights)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "deepseek_v3", "granite"])
def test_finetune(name, tmp_path):
    """Loads the model as `ktops finetune --model DIR` does, from a checkpoint and from a converted one."""
    save(name, tmp_path / "saved")
    reference = load(transformers.AutoModelForCausalLM, tmp_path / "saved")
    convert(Options(tmp_path / "saved", tmp_path / "converted", "int8"), Console(quiet=True))
    expect_experts(load_model(str(tmp_path / "converted"), torch.float32, "ktops"), reference)
    model = load_model(str(tmp_path / "saved"), torch.float32, "ktops")
    quantize_experts(model, "int8")
    expect_experts(model, reference)


def wrapper(path, layer, layer_idx, prefix=None):
    made = KTMoEWrapper(
        layer_idx, layer.num_experts, 2, layer.hidden_size, layer.intermediate_size, None,
        torch.get_num_threads(), 1, str(path), 512, method="AMXINT8", prefix=prefix,
    )  # fmt: skip
    made.load_weights()
    return made


def test_wrapper(saved):
    """Layers of the model in config.json are found by number, MTP layers by name."""
    path, _ = saved
    layers = open_checkpoint(path).layers
    numbers = [layer.index for layer in layers if layer.module is not None]
    for layer in layers:
        of_two = numbers.count(layer.index) > 1 or (layer.module is None and layer.index in numbers)
        loaded = wrapper(path, layer, layer.index, layer.name if of_two else None)
        expected = layer.read("int8", group_size=0)
        assert torch.equal(loaded.down_proj.weight, expected.down_proj.weight), layer.name


def test_wrapper_is_told_which_of_two(tmp_path):
    save("omni", tmp_path)
    layer = open_checkpoint(tmp_path).layers[0]
    with pytest.raises(
        ValueError,
        match=r"layer_idx must be one layer with experts, got 1: .* could be "
        r"talker.model.layers.1.mlp.experts and thinker.model.layers.1.mlp.experts. Pass prefix=",
    ):
        wrapper(tmp_path, layer, 1)
    found = [wrapper(tmp_path, layer, 1, prefix).down_proj.weight for prefix in ("thinker.", "talker.")]
    assert not torch.equal(*found)


def test_prefix_chooses_what_transformers_would_not_load(tmp_path):
    """The experts of an MTP layer can be loaded, for example into a model of one layer."""
    path = tmp_path / "saved"
    model_class = save("qwen3_next", path)
    model = load(model_class, path)
    with pytest.raises(
        CheckpointError,
        match=r"model.layers.1.mlp.experts: the experts of layer 1 are missing in .*, which has experts of "
        r"model.layers.\{0 to 1\} and mtp.layers.\{0\}",
    ):
        ktops.load_experts(model, path, prefix="mtp.")
    with pytest.raises(
        CheckpointError, match=r"starts with prefix='nothing.'; there are .*model.layers.\{0 to 1\}"
    ):
        ktops.load_experts(model, path, prefix="nothing.")
    del model.model.layers[1]
    ktops.load_experts(model, path, "int8", prefix="mtp.", show_progress=False)
    dense = load(model_class, path).model.layers[1].mlp.experts.down_proj.detach() * -2
    assert torch.equal(
        model.model.layers[0].mlp.experts.down_proj.weight, ktops.quantize(dense, "int8").weight
    )


def test_two_names_of_one_layer(tmp_path):
    """The layer has names with and without the base model's prefix, which transformers adds if missing."""
    model_class = save("mixtral", tmp_path)
    model = load(model_class, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    mine = {name.removeprefix("model."): tensor + 1 for name, tensor in tensors.items() if "experts" in name}
    save_file(tensors | mine, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"model.layers.0.mlp.experts could be layers.0.block_sparse_moe.experts and "
        "model.layers.0.block_sparse_moe.experts. Pass prefix=",
    ):
        ktops.load_experts(model, tmp_path)
    ktops.load_experts(model, tmp_path, "int8", prefix="model.", show_progress=False)
    ktops.load_experts(model, tmp_path, "int8", prefix="layers.", show_progress=False)
    loaded = model.model.layers[0].mlp.experts.down_proj.weight
    stacked = torch.stack([mine[f"layers.0.block_sparse_moe.experts.{e}.w2.weight"] for e in range(8)])
    assert torch.equal(loaded, ktops.quantize(stacked, "int8").weight)
    with pytest.raises(CheckpointError, match=r"could be layers.0.*. Pass prefix="):
        model_class.from_pretrained(tmp_path, quantization_config=ktops.KTConfig("int8"))
    config = ktops.KTConfig("int8", prefix="layers.")
    chosen = model_class.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(chosen.model.layers[0].mlp.experts.down_proj.weight, loaded)
    assert "prefix" not in config.to_dict()


def test_gguf_is_taken_by_number(tmp_path):
    """A file without the model's names goes to the only stack of the model, or an error lists the stacks."""
    save("omni", tmp_path)
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path)
    rng, tensors, dense = numpy.random.default_rng(0), {}, []
    for layer in range(2):
        weights = [
            rng.normal(size=size).astype("float32") for size in ((4, 16, 32), (4, 16, 32), (4, 32, 16))
        ]
        for name, weight in zip(("gate", "up", "down"), weights, strict=True):
            tensors[f"blk.{layer}.ffn_{name}_exps.weight"] = weight
        dense.append(torch.from_numpy(weights[2]))
    write_gguf(tmp_path / "model.gguf", tensors)
    with pytest.raises(
        ValueError,
        match=r"layer 0 of .* could be thinker.model.*layers.0.mlp.experts or "
        "talker.model.layers.0.mlp.experts of the model. Pass only the right part of the model",
    ):
        ktops.load_experts(model, tmp_path / "model.gguf")
    ktops.load_experts(model.thinker, tmp_path / "model.gguf", show_progress=False)
    for module, weight in zip(experts(model.thinker).values(), dense, strict=True):
        assert torch.equal(module.down_proj.weight, weight)


class Wrapped(torch.nn.Module):
    """A transformers model inside another module."""

    def __init__(self, model):
        super().__init__()
        self.inner = model


def test_parts_of_models(tmp_path):
    """Covers the base model, a part of a composite model, and a model inside another module."""
    save("omni", tmp_path)
    reference = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path)
    whole = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path)
    ktops.load_experts(whole.thinker, tmp_path, "int8", show_progress=False)
    expect_experts(whole.thinker, reference.thinker)
    assert isinstance(whole.talker.model.layers[0].mlp.experts.down_proj, torch.nn.Parameter)
    ktops.load_experts(whole.talker, tmp_path, "int8", show_progress=False)
    expect_experts(whole.talker, reference.talker)
    base = whole.thinker.model
    ktops.load_experts(base, tmp_path, "int8", show_progress=False)
    expect_experts(base, reference.thinker.model)
    wrapped = Wrapped(transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path))
    ktops.load_experts(wrapped, tmp_path, "int8", show_progress=False)
    expect_experts(wrapped.inner, reference)


def test_without_config_the_model_decides(tmp_path):
    """The given model determines how names are mapped, even without a config.json."""
    model_class = save("granite", tmp_path)
    model, reference = load(model_class, tmp_path), load(model_class, tmp_path)
    (tmp_path / "config.json").unlink()
    ktops.load_experts(model, tmp_path, "int8", show_progress=False)
    expect_experts(model, reference)
    with pytest.raises(
        CheckpointError,
        match=r"does not recognize any tensor name as an expert's. The names are "
        r".*model.layers.\*.block_sparse_moe.input_linear.weight",
    ):
        open_checkpoint(tmp_path).require_layers()


def test_a_missing_layer_is_not_taken_from_mtp(tmp_path):
    model_class = save("mixtral", tmp_path)
    model = load(model_class, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "layers.0." not in name}, file)
    tensors = load_file(file)
    mtp = {
        name.replace("model.layers.1.", "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if "experts" in name
    }
    save_file(tensors | mtp, file)
    with pytest.raises(
        CheckpointError, match=r"model.layers.0.mlp.experts: the experts of layer 0 are missing"
    ):
        ktops.load_experts(model, tmp_path)


def test_layers_of_mtp_alone_are_not_the_model(tmp_path):
    """Layers that transformers skips silently are not matched by number, even if there are no others."""
    model_class = save("qwen3_next", tmp_path)
    model = load(model_class, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name.startswith("mtp.")}, file)
    with pytest.raises(CheckpointError, match=r"are missing in .*, which has experts of mtp.layers.\{0\}"):
        ktops.load_experts(model, tmp_path)


def test_key_mapping_of_from_pretrained(tmp_path):
    """Names mapped by the caller are read as mapped."""
    model_class = save("mixtral", tmp_path)
    reference = load(model_class, tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace("model.layers", "backbone.blocks"): t for name, t in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    mapping = {r"^backbone\.blocks": "model.layers"}
    config = ktops.KTConfig("int8")
    model = load(model_class, tmp_path, key_mapping=mapping, quantization_config=config)
    expect_experts(model, reference)
