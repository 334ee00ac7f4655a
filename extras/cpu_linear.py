"""Faster linear layers and attention for CPUs, and two choices that differ between CPU and GPU.

oneDNN multiplies by weights in its own memory layout. torch's linear layer converts bfloat16 weights to that layout for
each product, and sends float32 weights to MKL, which is slow with few rows on AMD processors (docs/numbers.md).
`optimize` packs the weights once instead. In narrow compiled layers, sums are faster than a library call, because the
compiler turns them into loops.
"""

import functools
import itertools
import math
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import common


def cpu_attention(q, k, v, mask, is_causal):
    """Compute what `attention` in model.py does: q [B, H, S, d], k and v [B, H, W, d], mask [..., S, W].

    In bfloat16 on a CPU, separate products are 2x faster in training than torch's attention, up to about 512 positions.
    In generation torch's attention is 4x faster in float32, so the KV cache is float32 there. A compiled decoding step,
    S = 1, uses sums instead of products, because the compiler fuses them.
    """
    if q.shape[2] == 1 and not is_causal and torch.compiler.is_compiling():
        scores = (q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[3])
        return (torch.softmax(scores.masked_fill(~mask.mT, -math.inf), dim=2) * v).sum(2, keepdim=True)
    if q.dtype != torch.bfloat16 or q.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if k.dtype == torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[3]) + bias, dim=-1) @ v


def cache_dtype(tensor):
    """Return the dtype of a KV cache for keys and values like `tensor`: float32 for bfloat16 on a CPU."""
    return torch.float32 if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 else tensor.dtype


def slots_to_read(n_filled, slots):
    """Return the slots of a KV cache to read: on a CPU the filled ones, rounded up to an even number; on a GPU all.

    A GPU replays one recorded shape. A CPU saves work, and even numbers halve the shapes that are compiled.
    """
    return slots[: n_filled + n_filled % 2] if slots.device.type == "cpu" else slots


def optimize_for_cpu(model, dtype, compiled):
    """Replace the linear layers of blocks and heads by faster ones. Packed weights are not parameters."""
    is_wide = model.embed.weight.shape[1] >= 512
    use_packed = (dtype == torch.float32 and is_amd()) or (dtype == torch.bfloat16 and common.has_fast_bfloat16("cpu"))
    for parent in (model, *model.blocks):
        for name, module in [*parent.named_children()]:
            if type(module) is not nn.Linear:  # LoRALinear has another forward
                continue
            if use_packed and is_wide:
                setattr(parent, name, PackedLinear(module))
            elif compiled and module.in_features < 512:
                setattr(parent, name, SummedLinear(module))
            elif use_packed and dtype == torch.float32 and module.out_features >= module.in_features:
                module.weight.data = module.weight.data.t().contiguous().t()  # column-major is faster in MKL on AMD


def is_amd():
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


class SummedLinear(nn.Module):
    """A narrow linear layer without bias, as sums, for a compiled step of up to 8 rows: x [..., in] -> [..., out]."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        if x.shape[:-1].numel() > 8 or not torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        rows = x.to(self.weight.dtype).float().flatten(0, -2)
        sums = [(self.weight.float() * row).sum(-1) for row in rows]
        return torch.stack(sums).to(self.weight.dtype).unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """A wide linear layer without bias, whose weights are packed once: x [..., in] -> [..., out]."""

    by_number = weakref.WeakValueDictionary()  # of packed weights, because compiled code cannot hold packed tensors
    numbers = itertools.count()

    def __init__(self, linear):
        super().__init__()
        self.dtype, self.number, self.product = linear.weight.dtype, next(self.numbers), packed_linear()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 8)  # the layout for about 8 rows
        self.by_number[self.number] = self.weight

    def forward(self, x):
        return self.product(x.to(self.dtype), self.number)


@functools.cache
def packed_linear():
    """Define the operator (x [..., in], number of packed weights) -> [..., out] and return it."""
    name = "nanomusicgen::packed_linear"
    torch.library.define(name, "(Tensor x, int number) -> Tensor")

    @torch.library.impl(name, "CPU")
    def product(x, number):
        return torch.ops.mkldnn._linear_pointwise.default(x, PackedLinear.by_number[number], None, "none", [], "")

    @torch.library.register_fake(name)
    def shape(x, number):
        return x.new_empty(*x.shape[:-1], len(PackedLinear.by_number[number]))

    return torch.ops.nanomusicgen.packed_linear.default
