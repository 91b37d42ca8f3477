"""ktops.numa_placement: the weights of models on several nodes."""

import errno
import weakref
from collections import Counter

import every_model
import pytest
import torch
from fake_memory import PAGE, FakeMemory, machine
from torch import nn

import ktops
from ktops.integrations import numa_placement as placement
from ktops.nn import KTExperts, KTExpertSequence
from ktops.numa import pages as pages_module
from ktops.numa import system, topology
from ktops.numa.topology import pretend
from ktops.testing.compare import one_thread

E, H, I = 3, 512, 256  # noqa: E741


def dense(**options) -> KTExperts:
    return KTExperts(E, H, I, dtype=torch.bfloat16, **options)


def in_format(name: str, group_size: int) -> KTExperts:
    with one_thread():
        weights = (
            ktops.quantize(torch.randn(E, *shape), name, group_size=group_size)
            for shape in ((2 * I, H), (H, I))
        )
        return KTExperts.from_parameters(*weights)


def model(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"experts": experts})


def linear_experts() -> nn.Module:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
            self.down_proj, self.act_fn = nn.Linear(I, H, bias=False), nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    found = model(nn.ModuleList(Expert() for _ in range(E)))
    ktops.swap_experts(found)
    return found


@pytest.fixture
def two_nodes(monkeypatch):
    """``two_nodes(memory, cores...)`` makes this a machine with such memory and nodes."""

    def install(fake: FakeMemory | None = None, *cores: int, **options) -> FakeMemory:
        nodes = machine(*cores or (4, 4), **options)
        fake = fake or FakeMemory([node.id for node in nodes])
        fake.install(monkeypatch)
        monkeypatch.setattr(ktops.numa, "nodes", lambda: nodes)
        return fake

    return install


MODELS = {
    "dense": lambda: model(dense()),
    "transposed": lambda: model(dense(transposed=True)),
    "interleaved": lambda: model(dense(gating="interleaved")),
    "ungated": lambda: model(dense(gating="none", activation="relu2")),
    "int4": lambda: model(in_format("int4", 32)),
    "fp8 in blocks": lambda: model(in_format("fp8_e4m3", 128)),
    "sequence": lambda: model(KTExpertSequence(in_format("int8", 0))),
    "list": linear_experts,
}


def large_tensors(experts: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors that take more pages than two for each node, by name."""
    found = [*experts.named_parameters(), *experts.named_buffers()]
    return [(name, tensor.detach()) for name, tensor in found if tensor.nbytes >= 8 * PAGE * E]


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_every_expert_are_spread(two_nodes, kind):
    """Of a few pages of a matrix's part, that in the middle is on the part's node, whatever the kind."""
    placed = MODELS[kind]()
    fake = two_nodes()
    report = ktops.numa_placement(placed)
    assert torch.ops.kt.numa_rows(8) == [0, 4, 8]
    assert report.nodes == (0, 1) and len(report.layers) == 1 and not report.left
    assert report.at_home == sum(report.by_node.values()) >= report.nbytes
    assert abs(report.by_node[0] - report.by_node[1]) <= 0.15 * report.nbytes
    tensors = large_tensors(placed)
    assert tensors
    for name, tensor in tensors:
        is_list = tensor.dim() == 2  # one matrix of one expert
        rows = tensor.shape[-2]
        has_parts = "gate_up" in name and kind not in ("transposed", "interleaved", "ungated")
        size = rows // 2 if has_parts else rows
        for matrix in [tensor] if is_list else tensor:
            for part in matrix.split(size):
                quarter = [part[size // 4].data_ptr(), part[3 * size // 4].data_ptr()]
                assert [fake.where(address // PAGE * PAGE) for address in quarter] == [0, 1], name


def test_shares_are_those_of_the_cores(two_nodes):
    two_nodes(None, 6, 2)
    report = ktops.numa_placement(model(dense()))
    assert torch.ops.kt.numa_rows(8) == [0, 6, 8]
    assert report.by_node[0] / sum(report.by_node.values()) == pytest.approx(0.75, abs=0.05)


def test_numbers_of_nodes_need_not_begin_at_0(two_nodes):
    fake = FakeMemory([8, 16])
    two_nodes(fake, 2, 2, ids=[8, 16])
    report = ktops.numa_placement(model(dense()))
    assert report.nodes == (8, 16) and set(report.by_node) == {8, 16}


def test_one_node_of_two(two_nodes):
    """Everything goes there, and no task prefers it."""
    two_nodes()
    report = ktops.numa_placement(model(dense()), nodes=[1])
    assert set(report.by_node) == {1} and report.nodes == (1,)
    assert torch.ops.kt.numa_rows(8) == []


def test_summary(two_nodes):
    two_nodes()
    text = str(ktops.numa_placement(model(dense())))
    assert text.startswith("experts of 1 layers, 2.2 MiB: ")
    assert " MiB on node 0; " in text and " MiB on node 1; 100.0% on their node" in text


def test_what_is_left_is_in_the_summary(two_nodes):
    placed = model(dense())
    first = placed["experts"].down_proj.data_ptr() // PAGE * PAGE
    expert = range(first, first + H * I * 2, PAGE)  # the first one, of which a half would move
    two_nodes(FakeMemory(shared=expert))
    report = ktops.numa_placement(placed)
    assert report.left == {"shared with other processes": pytest.approx(H * I, abs=2 * PAGE)}
    assert f"{report.left['shared with other processes'] / 1024:.1f} KiB shared with other" in str(report)
    assert report.at_home + sum(report.left.values()) == sum(report.by_node.values())


@pytest.mark.parametrize("has_room", [True, False])
def test_absent_pages_are_read_if_they_fit(two_nodes, monkeypatch, tmp_path, has_room):
    placed = model(dense())
    first = placed["experts"].down_proj.data_ptr() // PAGE * PAGE
    absent = range(first + PAGE, first + 11 * PAGE, PAGE)
    two_nodes(FakeMemory(absent=absent))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 100 kB\nMemAvailable: {40 if has_room else 39} kB\n")
    monkeypatch.setattr(placement, "MEMINFO", meminfo)
    left = ktops.numa_placement(placed).left
    assert left == ({} if has_room else {"not in memory": 10 * PAGE})


def test_one_node_is_nothing_to_do(monkeypatch):
    monkeypatch.delenv(topology.VARIABLE, raising=False)
    monkeypatch.setattr(ktops.numa, "nodes", lambda: machine(2))
    report = ktops.numa_placement(model(dense()))
    assert str(report) == "experts of 1 layers, 2.2 MiB: node 0 is the only one, nothing to move"
    assert not report.by_node and torch.ops.kt.numa_rows(8) == []


def test_pretended_nodes_move_no_page(monkeypatch):
    monkeypatch.setenv(topology.VARIABLE, "2")

    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(system, "move_pages", refuse)
    placed = model(dense())
    report = ktops.numa_placement(placed)
    assert report.pretended and not report.by_node
    assert str(report).endswith("tasks prefer pretended nodes 0, 1; no page was moved")
    assert torch.ops.kt.numa_rows(8) == [0, 4, 8]
    with ktops.profile() as profile:
        placed["experts"](torch.randn(4, H), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    assert profile.at_home is not None


def test_one_of_the_pretended_nodes(monkeypatch):
    monkeypatch.setattr(ktops.numa, "nodes", lambda: pretend(machine(4), "2"))
    report = ktops.numa_placement(model(dense()), nodes=[1])
    assert str(report).endswith("pretended node 1 is the only one, so tasks prefer none; no page was moved")
    assert torch.ops.kt.numa_rows(8) == []


def test_pages_are_listed_one_tensor_at_a_time(two_nodes, monkeypatch):
    """The lists of a large model's pages take a gigabyte."""
    two_nodes()
    alive = []

    def homes_of_pages(*arguments):
        assert not any(pages() is not None for pages in alive)
        found = pages_module.homes_of_pages(*arguments)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(placement, "homes_of_pages", homes_of_pages)
    ktops.numa_placement(model(dense()))
    assert len(alive) == 4


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("call", ["move_pages", "get_policy", "set_policy"])
def test_a_system_that_refuses(two_nodes, monkeypatch, call, code):
    """As containers do. Nothing changes."""
    fake = two_nodes()

    def refuse(*arguments):
        raise OSError(code, f"{call}: refused")

    monkeypatch.setattr(system, call, refuse)
    with pytest.raises(OSError, match="numa_placement: the system does not let this process move pages") as e:
        ktops.numa_placement(model(dense()))
    assert e.value.errno == code and not fake.node_of
    assert torch.ops.kt.numa_rows(8) == []


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("both", "nodes must be 'all' or numbers of nodes, got 'both'"),
        ([], r"nodes must be different ones of \[0, 1\], .* got \[\]"),
        ([0, 0], r"got \[0, 0\]"),
        ([0, 2], r"got \[0, 2\]"),
    ],
)
def test_other_nodes(two_nodes, nodes, message):
    two_nodes()
    with pytest.raises(ValueError, match=f"numa_placement: .*{message}"):
        ktops.numa_placement(model(dense()), nodes=nodes)


@pytest.mark.parametrize("nodes", [0, None, [True], [0.0], ["0"]])
def test_nodes_that_are_no_list_of_integers(two_nodes, nodes):
    two_nodes()
    with pytest.raises(TypeError, match="nodes must be 'all' or a list of integers, got"):
        ktops.numa_placement(model(dense()), nodes=nodes)


def test_nodes_without_memory(two_nodes):
    two_nodes(None, 2, 2, memory=0)
    with pytest.raises(ValueError, match=r"nodes must have memory that this process may use, got \[0, 1\]"):
        ktops.numa_placement(model(dense()))


def test_models_without_experts(two_nodes):
    two_nodes()
    with pytest.raises(ValueError, match="numa_placement: model must have Mixture-of-Experts layers"):
        ktops.numa_placement(nn.Linear(2, 2))


def test_experts_that_are_not_loaded(two_nodes):
    two_nodes()
    with pytest.raises(ValueError, match=r"numa_placement: .* its weights are on meta, not in CPU memory"):
        ktops.numa_placement(model(dense(device="meta")))


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss", "dbrx", "jetmoe", "llama4", "nllb_moe"])
def test_models_of_transformers(two_nodes, folder):
    """Every kind of experts that ktops runs in place of those of transformers."""
    found = every_model.tiny_model(folder)
    ktops.swap_experts(found)
    two_nodes()
    report = ktops.numa_placement(found)
    experts = [found.get_submodule(name) for name in report.layers]
    assert experts and not report.left
    matrices = Counter(
        parameter.nbytes
        for module in experts
        for name, parameter in module.named_parameters()
        if parameter.dim() >= 2 and "bias" not in name and "router" not in name
    )
    assert report.nbytes == sum(size * count for size, count in matrices.items())
