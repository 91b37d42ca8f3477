"""A part of the experts of a layer, as one of several processes reads it."""

import pytest
import torch
from tiny_checkpoints import decode
from tiny_kinds import KINDS, SCHEMES, E, publish
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.experts import Experts, StoredExperts

PARTS = (range(E // 2), range(E // 2, E))


@pytest.fixture(
    scope="module", params=[(kind, scheme) for kind in KINDS for scheme in SCHEMES], ids=" of ".join
)
def layers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "source"
    publish(folder, *request.param, attention=False)
    return open_checkpoint(folder).layers


def expect_part(experts: Experts, chosen: range) -> None:
    whole, part = experts.read(), experts.part(chosen)
    assert part.shape == (len(chosen), *experts.shape[1:])
    assert part.nbytes * E == experts.nbytes * len(chosen)
    read = part.read()
    assert (read.format, read.group_size) == (whole.format, whole.group_size)
    assert torch.equal(decode(read), decode(whole)[chosen.start : chosen.stop])


@pytest.mark.filterwarnings("ignore:ktops. ")
@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_every_scheme(layers, weight_format):
    for layer in layers:
        for experts in layer.experts(weight_format):
            for part in PARTS:
                expect_part(experts, part)


@pytest.mark.filterwarnings("ignore:ktops. ")
def test_mapped_in_place(layers):
    """A part maps at least its share of the bytes that all experts map; one expert has nothing in between."""
    for layer in layers:
        for experts in layer.experts():
            assert isinstance(experts, StoredExperts)
            for stored in (experts, experts.in_place()):
                for part in PARTS:
                    expect_part(stored, part)
                    assert 2 * stored.part(part).mapped >= stored.mapped


def test_converted_files_are_mapped(tmp_path, enabled):
    """The files that ktops writes map all of a part, and nothing else."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    config = ktops.KTConfig(weight_format="int4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "int4")
    for experts in open_checkpoint(tmp_path / "int4").layers[0].experts():
        part = experts.part(range(2, 6))
        assert part.mapped == part.nbytes == experts.mapped // 2
        assert torch.equal(decode(part.read()), decode(experts.read())[2:6])


def test_names_of_the_whole(layers):
    """Messages name an expert by its number in the file."""
    for experts in layers[0].experts():
        assert experts.part(range(1, E)).name(0) == experts.name(1)
