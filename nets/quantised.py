"""Weights in 8 bits, of a network that is not trained: a byte for each, a scale for each row.

    quantised        W (out, in) -> bytes and scales (out, 1) in fp32; int8, or float8_e4m3fn
    Quantised        a linear layer with such a weight, which computes in the dtype of what comes
    load_quantised   some layers so, the rest as it is, from tensors that come one by one

The bytes are exact in bf16, so the product is taken with them and its columns are scaled: nothing
is rounded twice, and only one layer at a time is there in 16 bits.
"""

from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.strict import SCALES
from nets.weights import assign

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # as --base-dtype names them
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows scaled so that the largest of each is the largest there is; zeros stay zeros."""
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST[dtype]).clamp_min(1e-30)
    parts = weight / scale
    return (parts.round() if dtype == torch.int8 else parts).to(dtype), scale


class Product(torch.autograd.Function):
    """x (..., in) -> (..., out); a backward pass widens the weight again, nothing keeps it wide."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        y = F.linear(x, weight.to(x.dtype))
        return (y * scale.T[0]).to(y.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        scaled = (gradient * scale.T[0]).to(gradient.dtype)
        return (scaled @ weight.to(gradient.dtype)).to(ctx.dtype), None, None


class Quantised(nn.Linear):
    """In place of a linear layer; the weight is a parameter that wants no gradient."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        empty = torch.empty_like(layer.weight, dtype=dtype)
        self.weight, self.bias = nn.Parameter(empty, requires_grad=False), layer.bias
        self.register_buffer("scale", layer.weight.new_empty(len(empty), 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def load_quantised(
    net: nn.Module,
    chosen: Collection[str],
    kind: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> nn.Module:
    """net: on the meta device; chosen: its layers in 8 bits, by name; tensors: as stored, a scale
    before the weight that it belongs to, see `each_weight`.

    A weight that is stored in `kind` is taken as it is, with its scale (else 1).
    """
    scale = None
    for name in chosen:
        net.set_submodule(name, Quantised(net.get_submodule(name), kind))
    for name, tensor in tensors:
        if name.endswith(SCALES):
            scale = tensor
            continue
        owner, mine = name.removesuffix(".weight"), torch.ones(1) if scale is None else scale
        mine, scale = mine.to(tensor.device), None
        if owner not in chosen or owner == name:
            assign(net, name, (tensor.float() * mine).to(dtype))
            continue
        if tensor.dtype == kind:
            mine = mine.reshape(-1, 1).expand(len(tensor), 1).contiguous()
        else:
            tensor, mine = quantised(tensor.float() * mine, kind)
        module = net.get_submodule(owner)
        module.weight = nn.Parameter(tensor, requires_grad=False)
        module.scale = mine
    return net
