"""LoRA (arXiv:2106.09685): fine-tune a model by low-rank matrices next to its frozen weights."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError


class LoRALinear(nn.Linear):
    """A linear layer W plus a learned low-rank matrix: W + alpha / rank * B A. It equals W at first, because B is 0."""

    def __init__(self, in_features, out_features, rank, alpha):
        super().__init__(in_features, out_features, bias=False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(blocks, rank, alpha, targets):
    """Replace the linear layers named in `targets`, such as 'qkv' or 'up', by new LoRALinear in each block."""
    for block in blocks:
        linears = {name: module for name, module in block.named_children() if isinstance(module, nn.Linear)}
        for name in targets:
            if name not in linears:
                raise UserError(f"lora_targets: a block has no '{name}'; choose from {', '.join(linears)}")
            linear = linears[name]
            setattr(block, name, LoRALinear(linear.in_features, linear.out_features, rank, alpha))


def merge_lora(state, settings):
    """Add each low-rank matrix of a state dict to its weight: return the state dict of the same model without LoRA."""
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_a"):
            linear = name.removesuffix(".lora_a")
            scale = settings["lora_alpha"] / settings["lora_rank"]
            merged[f"{linear}.weight"] = state[f"{linear}.weight"] + scale * state[f"{linear}.lora_b"] @ state[name]
    return merged
