"""The calls of SGLang's two servers, as they write them, through ``import kt_kernel``.

"upstream" is sgl-project/sglang 0.5.23, "kvcache" is kvcache-ai/sglang.
"""

import pytest
import torch
from tiny_checkpoints import write_per_expert
from tiny_layer import ALPHA, RANK, SIZES, adapters, assert_close, dense, inputs, layer, make, reference
from tiny_schemes import SCHEMES

from ktops.compat.lora import NAMES
from ktops.formats import Codes, get_format
from ktops.testing.budgets import forward_budget

pytestmark = pytest.mark.usefixtures("single_thread", "installed")

E, H, I = SIZES["num_experts"], SIZES["hidden_size"], SIZES["moe_intermediate_size"]  # noqa: E741
STREAM = 0
"""What ``torch.cuda.current_stream(device).cuda_stream`` is for the default stream."""


@pytest.fixture
def checkpoint(tmp_path):
    write_per_expert(tmp_path, SCHEMES["bf16"][0], num_experts=E, hidden=H, intermediate=I)
    return str(tmp_path)


def upstream(checkpoint: str, **options):
    """Returns a wrapper made as KTEPWrapperMethod.create_weights of upstream makes it."""
    from kt_kernel import KTMoEWrapper

    given = {
        "layer_idx": 0,
        **SIZES,
        "num_gpu_experts": 1,
        "cpuinfer_threads": torch.get_num_threads(),
        "threadpool_count": 1,
        "weight_path": checkpoint,
        "chunked_prefill_size": 512,
        "method": "BF16",
        "max_deferred_experts_per_token": 0,
    }
    return KTMoEWrapper(**(given | options))


def kvcache(checkpoint: str, mask: torch.Tensor, **options):
    """Returns a wrapper made as KTEPWrapperMethod.create_weights of kvcache makes it."""
    from kt_kernel import KTMoEWrapper

    common = {
        "layer_idx": 0,
        **SIZES,
        "gpu_experts_mask": mask,
        "cpuinfer_threads": torch.get_num_threads(),
        "threadpool_count": 1,
        "numa_nodes": None,
        "weight_path": checkpoint,
        "chunked_prefill_size": 512,
    }
    plain = {
        "swiglu_limit": 0.0,
        "swiglu_alpha": 0.0,
        "method": "BF16",
        "max_deferred_experts_per_token": 0,
    }
    return KTMoEWrapper(**common, **(options if "mode" in options else plain | options))


def close(actual, expected) -> None:
    assert_close({"output": actual}, {"output": expected}, forward_budget(torch.bfloat16))


def run(wrapper, routed):
    """Submits and awaits a forward as both servers do."""
    hidden_states, topk_ids, topk_weights = routed
    wrapper.submit_forward(hidden_states, topk_ids.int(), topk_weights, STREAM)
    return wrapper.sync_forward(hidden_states, STREAM)


def on_cpu(routed, mask):
    """Returns the same routes without those to experts on the GPU."""
    hidden_states, topk_ids, topk_weights = routed
    return hidden_states, topk_ids.masked_fill(mask[topk_ids], -1), topk_weights


def test_upstream_runs_the_experts_that_are_not_on_the_gpu(checkpoint):
    wrapper = upstream(checkpoint)
    wrapper.load_weights(torch.arange(E))
    routed = inputs(wrapper)
    close(run(wrapper, routed), reference(wrapper, *on_cpu(routed, torch.arange(E) < 1)))


def test_upstream_masks_its_own_ids_after_it_submitted_them(checkpoint):
    wrapper = upstream(checkpoint)
    wrapper.load_weights(torch.arange(E))
    hidden_states, topk_ids, topk_weights = inputs(wrapper)
    expected = reference(wrapper, *on_cpu((hidden_states, topk_ids, topk_weights), torch.arange(E) < 1))
    wrapper.submit_forward(hidden_states, topk_ids, topk_weights, STREAM)
    topk_ids[topk_ids >= 1] = -1
    close(wrapper.sync_forward(hidden_states, STREAM), expected)


def test_upstream_loads_while_another_device_is_the_default(checkpoint):
    with torch.device("meta"):
        wrapper = upstream(checkpoint)
        wrapper.load_weights(torch.arange(E, device="cpu"))
    routed = inputs(wrapper)
    close(run(wrapper, routed), reference(wrapper, *on_cpu(routed, torch.arange(E) < 1)))


def test_both_register_the_batch_sizes_of_their_graphs():
    from kt_kernel import KTMoEWrapper

    KTMoEWrapper.set_capture_batch_sizes([1, 2, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 4]


def test_upstream_moves_experts_by_its_map(checkpoint):
    order = torch.tensor([2, 0, 3, 1])
    moved, straight = upstream(checkpoint, num_gpu_experts=0), upstream(checkpoint, num_gpu_experts=0)
    moved.load_weights(order)
    straight.load_weights(torch.arange(E))
    hidden_states, topk_ids, topk_weights = inputs(moved)
    assert torch.equal(
        run(moved, (hidden_states, topk_ids, topk_weights)),
        run(straight, (hidden_states, order[topk_ids], topk_weights)),
    )


def test_both_defer_experts_but_not_in_the_last_layer(checkpoint):
    layers = [upstream(checkpoint, layer_idx=i, max_deferred_experts_per_token=1 - i) for i in range(2)]
    for wrapper in layers:
        wrapper.load_weights(torch.arange(E))
    routed = inputs(layers[0])
    outputs = [run(wrapper, routed).double() for wrapper in layers]
    without_first = on_cpu(routed, torch.arange(E) < 1)
    close(sum(outputs), sum(reference(wrapper, *without_first) for wrapper in layers))


def test_kvcache_chooses_the_experts_for_the_gpu():
    from kt_kernel import generate_gpu_experts_masks

    frequencies = torch.tensor([[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]])
    masks = generate_gpu_experts_masks(frequencies, 3)
    assert masks.tolist() == [[False, True, False, True], [False, False, True, False]]
    assert masks.device.type == "cpu" and masks.dtype == torch.bool
    assert generate_gpu_experts_masks(frequencies, 0).sum() == 0
    assert generate_gpu_experts_masks(frequencies, 100).all()
    with pytest.raises(ValueError, match=r"activation_freq must have shape \[num_layers, num_experts\], got"):
        generate_gpu_experts_masks(frequencies[0], 1)


def test_kvcache_changes_the_mask_while_it_runs(checkpoint):
    mask = torch.tensor([True, False, False, True])
    wrapper = kvcache(checkpoint, mask)
    wrapper.load_weights(torch.arange(E))
    routed = inputs(wrapper)
    close(run(wrapper, routed), reference(wrapper, *on_cpu(routed, mask)))
    wrapper.gpu_experts_mask.copy_(~mask)
    close(run(wrapper, routed), reference(wrapper, *on_cpu(routed, ~mask)))
    assert mask.tolist() == [True, False, False, True]


@pytest.mark.parametrize(("limit", "alpha"), [(0.5, 0.0), (0.5, 1.702), (0.0, 1.702)])
@pytest.mark.parametrize("method", ["MXFP4", "MXFP8"])
def test_kvcache_clamps_the_activation(method, limit, alpha):
    wrapper = make(method, swiglu_limit=limit, swiglu_alpha=alpha)
    wrapper.compute = "bf16"
    hidden_states, topk_ids, topk_weights = inputs(wrapper)
    gate, up = (hidden_states.double() @ part.mT for part in dense(wrapper.gate_up_proj).chunk(2, dim=1))
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    hidden = gate * torch.sigmoid((alpha or 1.0) * gate) * (up + (1 if alpha else 0))
    every = hidden @ dense(wrapper.down_proj).mT
    routes = torch.zeros(len(hidden_states), E, dtype=torch.float64)
    routes.scatter_add_(1, topk_ids, topk_weights.double())
    expected = torch.einsum("eth,te->th", every, routes)
    close(run(wrapper, (hidden_states, topk_ids, topk_weights)), expected)
    plain = reference(wrapper, hidden_states, topk_ids, topk_weights)
    assert (expected - plain).norm() > 0.05 * expected.norm()


def test_kvcache_serves_adapters_of_experts(checkpoint):
    wrapper = kvcache(
        checkpoint, torch.zeros(E, dtype=torch.bool), method="AMXBF16_SFT", mode="sft", num_gpu_experts=0,
        lora_rank=RANK, lora_alpha=ALPHA, max_cache_depth=1,
    )  # fmt: skip
    wrapper.load_weights(torch.arange(E))
    given = adapters(wrapper)
    wrapper.init_lora_weights(*given.values(), *(torch.zeros_like(tensor) for tensor in given.values()))
    hidden_states, topk_ids, topk_weights = inputs(wrapper)
    wrapper.submit_forward_inference(hidden_states, topk_ids.int(), topk_weights, STREAM)
    output = wrapper.sync_forward_inference(STREAM)
    factors = {name: given[name].double() for name in NAMES}
    expected = layer(wrapper, hidden_states.double(), topk_ids, topk_weights.double(), factors)
    close(output, expected)
    assert output.dtype == hidden_states.dtype and not output.requires_grad
    with pytest.raises(RuntimeError, match="no forward to differentiate"):
        wrapper.backward(torch.ones_like(output))
    with pytest.raises(RuntimeError, match=r"call submit_forward_inference\(\) first"):
        wrapper.sync_forward_inference(STREAM)


BUFFERS = {
    "BF16": ("bf16", torch.bfloat16, None),
    "RAWINT4": ("int4", torch.uint8, (torch.bfloat16, 1, 32)),
    "FP8": ("fp8_e4m3", torch.float8_e4m3fn, (torch.float32, 128, 128)),
    "FP8_PERCHANNEL": ("fp8_e4m3", torch.float8_e4m3fn, (torch.float32, 1, 0)),
    "MXFP8": ("mxfp8", torch.float8_e4m3fn, (torch.uint8, 1, 32)),
    "MXFP4": ("mxfp4", torch.uint8, (torch.bfloat16, 1, 32)),
}
"""method -> its format, the dtype of the codes, and of the scales their dtype, rows and columns."""


class Buffers:
    """Buffers of one GPU, with room for two experts, as a server allocates them."""

    def __init__(self, method: str, hidden: int, part: int) -> None:
        _, dtype, scales = BUFFERS[method]
        packed = 2 if dtype == torch.uint8 else 1
        self.parts = {
            "w13": torch.zeros(2, 2 * part, hidden // packed, dtype=dtype),
            "w2": torch.zeros(2, hidden, part // packed, dtype=dtype),
        }
        if scales is not None:
            kind, rows, columns = scales
            shapes = {"w13_scale": (2 * part, hidden), "w2_scale": (hidden, part)}
            for name, (n, k) in shapes.items():
                self.parts[name] = torch.zeros(2, n // rows, k // columns if columns else 1, dtype=kind)

    def address(self, name: str, slot: int) -> int:
        return self.parts[name][slot].data_ptr() if name in self.parts else 0

    def weights(self, method: str, slot: int):
        """Returns w13 and w2 of a slot in float32."""
        format, _, scales = BUFFERS[method]
        decoded = []
        for name in ("w13", "w2"):
            codes = self.parts[name][slot]
            if scales is None:
                decoded.append(codes.float())
                continue
            scale = self.parts[f"{name}_scale"][slot]
            if format == "mxfp4":
                scale = (scale.float().log2() + 127).to(torch.uint8)
            columns = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
            decoded.append(get_format(format).dequantize(Codes(codes, scale), columns, scales[2]))
        return decoded


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("method", BUFFERS)
def test_kvcache_prefills_on_its_gpus(method, gpus):
    hidden, size = 256, 256
    wrapper = make(method, hidden_size=hidden, moe_intermediate_size=size, num_experts=3)
    buffers = [Buffers(method, hidden, size // gpus) for _ in range(gpus)]
    names = ("w13", "w13_scale", "w2", "w2_scale")

    def submit(expert: int) -> None:
        pointers = [[each.address(name, expert % 2) for each in buffers] for name in names]
        wrapper.submit_write_weight_scale_to_buffer(gpus, expert, *pointers)

    submit(0)
    for expert in range(3):
        wrapper.sync_write_weight_scale_to_buffer()
        read = [each.weights(method, expert % 2) for each in buffers]
        if expert < 2:
            submit(expert + 1)
        halves = zip(*(w13.chunk(2) for w13, _ in read), strict=True)
        gate_up = torch.cat([torch.cat(parts) for parts in halves])
        down = torch.cat([w2 for _, w2 in read], dim=1)
        assert torch.equal(gate_up.double(), dense(wrapper.gate_up_proj)[expert])
        assert torch.equal(down.double(), dense(wrapper.down_proj)[expert])


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8", "GPTQ_INT4"])
def test_methods_without_buffers_name_the_option_to_leave_out(method):
    wrapper = make(method)
    with pytest.raises(NotImplementedError, match="without --kt-gpu-prefill-token-threshold"):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, [8], [8], [8], [8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4, [8], [8], [8], [8]), "expert_id must be from 0 to 3, got 4"),
        ((2, 0, [8, 8], [8, 8], [8, 8], [8, 8]), "gpu_tp_count must divide moe_intermediate_size=96 into"),
        ((2, 0, [8], [8], [8], [8]), r"every list must have gpu_tp_count=2 addresses, got \[1, 1, 1, 1\]"),
        ((1, 0, [8], [0], [8], [8]), r"w13_scale must have 1 addresses, got \[0\]"),
    ],
)
def test_buffers_are_checked_before_anything_is_written(arguments, message):
    with pytest.raises(ValueError, match=f"^KTMoEWrapper: {message}"):
        make("RAWINT4").submit_write_weight_scale_to_buffer(*arguments)


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_weights_packed_for_amx_say_what_to_do(tmp_path, kind):
    if kind == "files":
        from safetensors.torch import save_file

        name = "blk.0.ffn_gate_exps.0.numa.0.weight"
        save_file({name: torch.zeros(4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    else:
        folder = tmp_path / "_layer_0" / "_numa_0"
        folder.mkdir(parents=True)
        (folder / "INT4_gate_0_4Byte_quant_.kt").write_bytes(b"1234")
    wrapper = upstream(str(tmp_path), method="AMXINT4")
    with pytest.raises(ValueError, match=r"has packed these experts.*original checkpoint.*ktops convert"):
        wrapper.load_weights(torch.arange(E))
