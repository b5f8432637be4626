"""Depthwise convolution by the kernel that is fastest here, and torch's own wherever a graph is made for elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import kernels


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """F.conv2d of maps x (B, C, H, W) with kernels (C, 1, kh, kw), one a channel; under autocast in its dtype."""
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, stride, padding, groups=weight.shape[0])
    else:
        return _depthwise(x, weight, bias, stride, padding)


@torch.jit.unused
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if isinstance(x, torch.fx.Proxy) or not x.is_cuda:
        return F.conv2d(x, weight, bias, stride, padding, groups=weight.shape[0])
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return kernels.depthwise_conv2d(x, weight, bias, stride, padding)


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one kernel a channel: maps (B, dim, H, W) -> (B, dim, H', W').

    Args:
        dim: channels.
        kernel_size: odd; centred, so that H' = ceil(H / stride).
        stride, bias: as nn.Conv2d takes them.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True):
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise(input, weight, bias, self.stride[0], int(self.padding[0]))
