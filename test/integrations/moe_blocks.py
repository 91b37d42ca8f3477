"""MoE blocks as in models outside transformers: experts in a ModuleList, iterated by the block."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktops.nn import KTExperts

H, I, E, K = 32, 24, 6, 2  # noqa: E741


class GatedMLP(nn.Module):
    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        for name, sizes in zip(self.names, ((H, I), (H, I), (I, H)), strict=True):
            setattr(self, name, nn.Linear(*sizes, bias=bias))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class MixtralMLP(GatedMLP):
    names = ("w1", "w3", "w2")


class UngatedMLP(nn.Module):
    """Two linear layers; with a dropout before the second, or after it."""

    names = ("fc1", "fc2")

    def __init__(self, dropout: float = 0.0, drop_output: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, I), nn.Linear(I, H)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.drop_output = drop_output

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.dropout(self.fc2(hidden)) if self.drop_output else self.fc2(self.dropout(hidden))


class ClampedMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-7, 7))


class LoopBlock(nn.Module):
    """A linear router, with softmax, top-k and the loop over experts in the block's forward."""

    def __init__(self, expert: type[nn.Module] = GatedMLP, **options) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([expert(**options) for _ in range(E)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, H)
        weights, ids = F.softmax(self.gate(x), dim=-1, dtype=torch.float).topk(K, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        output = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for index in range(E):
            slot, token = torch.where(mask[index])
            rows = x[None, token].reshape(-1, H)
            rows = self.experts[index](rows) * weights[token, slot, None]
            output.index_add_(0, token, rows.to(x.dtype))
        return output.view(hidden_states.shape)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.linear(x, self.weight).sigmoid().topk(K, dim=-1, sorted=False)
        return ids, 1.5 * weights / weights.sum(-1, keepdim=True)


class InferBlock(nn.Module):
    """A router module and a shared expert; a loop in training mode and ``moe_infer`` in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = nn.ModuleList([GatedMLP() for _ in range(E)])
        self.shared_experts = GatedMLP()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, H)
        topk_ids, topk_weight = self.gate(x)
        if self.training:
            rows, flat = x.repeat_interleave(K, dim=0), topk_ids.view(-1)
            y = torch.empty_like(rows)
            for index, expert in enumerate(self.experts):
                y[flat == index] = expert(rows[flat == index])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
        else:
            y = self.moe_infer(x, topk_ids, topk_weight)
        return (y + self.shared_experts(x)).view(hidden_states.shape)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        counts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        tokens_per_expert = counts.scatter_(1, topk_ids, 1).sum(dim=0).tolist()
        order = topk_ids.view(-1).argsort()
        rows = x[order // topk_ids.shape[1]].split(tokens_per_expert)
        outputs = torch.cat([self.experts[index](part) for index, part in enumerate(rows)])
        y = torch.empty_like(outputs)
        y[order] = outputs
        y = y.view(*topk_ids.shape, -1).type(topk_weight.dtype) * topk_weight.unsqueeze(dim=-1)
        return y.sum(dim=1).type(x.dtype)


class TwoLayers(nn.Module):
    """A model of two blocks, with a loss."""

    def __init__(self, block: type[nn.Module], **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([block(**options) for _ in range(2)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, x.shape[-1:]))
        return x


class Stacked(nn.Module):
    """Experts with stacked weights that do not declare their layout."""

    def __init__(self, scale_input: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        like = KTExperts(E, H, I)
        self.gate_up_proj, self.down_proj = like.gate_up_proj, like.down_proj
        self.act_fn = activation or nn.SiLU()
        self.scale_input = scale_input

    def forward(self, x, ids, weights):
        x = x[:, None] * (weights[..., None] if self.scale_input else 1)
        x = x.expand(*ids.shape, H)[..., None]
        gate, up = (self.gate_up_proj[ids] @ x)[..., 0].chunk(2, dim=-1)
        y = (self.down_proj[ids] @ (self.act_fn(gate) * up)[..., None])[..., 0]
        return (y if self.scale_input else weights[..., None] * y).sum(1)
