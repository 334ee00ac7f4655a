"""Linear layers for few rows on a CPU (GEMV), as in a step of generation; `optimize` in generate.py says which, when.

oneDNN multiplies by weights in a layout of its own. torch's linear layer brings those in bfloat16 into that layout for
each product, and gives those in float32 to MKL, slow with few rows on AMD's processors (docs/numbers.md).
"""

import functools
import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import common


def is_amd():
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def can_pack(device, dtype):
    """Whether packed weights of that type are quicker there."""
    if device.type != "cpu":
        return False
    return (dtype == torch.float32 and is_amd()) or (dtype == torch.bfloat16 and common.has_fast_bfloat16("cpu"))


class SummedLinear(nn.Module):
    """A narrow layer without bias, made of another one, for a compiled step of up to 8 rows; x [..., in] -> [..., out].

    Sums for products: the compiler makes loops of them, where a call of a library costs more than the arithmetic.
    """

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
    """A wide layer without bias, made of another one, whose weights are packed once; x [..., in] -> [..., out]."""

    by_number = weakref.WeakValueDictionary()  # the weights of all, as a compiled step can hold no packed tensor
    numbers = itertools.count()

    def __init__(self, linear):
        super().__init__()
        self.dtype, self.number, self.product = linear.weight.dtype, next(self.numbers), packed_linear()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 8)  # the layout for 8 rows or so
        self.by_number[self.number] = self.weight

    def forward(self, x):
        return self.product(x.to(self.dtype), self.number)


@functools.cache
def packed_linear():
    """The operator (x [..., in], number) -> its product with the weights of that number, [..., out]."""
    name = "nanomusicgen::packed_linear"
    torch.library.define(name, "(Tensor x, int number) -> Tensor")

    @torch.library.impl(name, "CPU")
    def product(x, number):
        return torch.ops.mkldnn._linear_pointwise.default(x, PackedLinear.by_number[number], None, "none", [], "")

    @torch.library.register_fake(name)
    def shape(x, number):
        return x.new_empty(*x.shape[:-1], len(PackedLinear.by_number[number]))

    return torch.ops.nanomusicgen.packed_linear.default
