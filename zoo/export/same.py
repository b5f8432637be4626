"""TensorFlow's "same" padding as one operation of ONNX, for graphs of any image size.

What such a convolution pads depends on whether a side is even. Written out for a side that is a symbol, and nested once
for every level of a network, that is more than the exporter simplifies in ten minutes.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn


@torch.library.custom_op("zoo::conv2d_same", mutates_args=())
def conv2d_same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], groups: int) -> Tensor:
    """(B, C, H, W) -> (B, O, ceil(H / stride[0]), ceil(W / stride[1])); the larger half of the padding is at the end.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn, "SAME" padding.
    """
    padding: list[int] = []
    for axis in (1, 0):
        side, step, kernel = x.shape[2 + axis], stride[axis], weight.shape[2 + axis]
        total = max((-(-side // step) - 1) * step + kernel - side, 0)
        padding += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups)


@conv2d_same.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], groups: int) -> Tensor:
    # Not -(-side // step): the exporter's division rounds towards zero.
    height, width = ((side + step - 1) // step for side, step in zip(x.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


class _Same(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.groups = list(conv.stride), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_same(x, self.weight, self.bias, self.stride, self.groups)


def with_same_padding(network: nn.Module) -> nn.Module:
    """The network, or a copy of it whose convolutions with "same" padding are the operation above."""
    if not any(_fits(module) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if _fits(module):
                setattr(parent, name, _Same(module))  # type: ignore[arg-type]
    return network


def translations() -> dict[Any, Any]:
    """How torch's exporter writes the operation."""
    from onnxscript import opset18 as op

    def conv(x, weight, bias, stride, groups):
        given = [] if bias is None else [bias]
        return op.Conv(x, weight, *given, auto_pad="SAME_UPPER", strides=stride, group=groups)

    return {torch.ops.zoo.conv2d_same.default: conv}


def _fits(module: nn.Module) -> bool:
    return isinstance(module, Conv2dSame) and tuple(module.dilation) == (1, 1)
