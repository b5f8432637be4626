"""Convolution with BatchNorm, which one convolution replaces for inference."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.layers.conv2d import Conv2d


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm: maps (B, in_chans, H, W) -> (B, out_chans, H', W').

    Args:
        in_chans, out_chans: channels.
        kernel_size, stride: of the convolution; an odd kernel is centred, so that H' = ceil(H / stride).
        groups: of the convolution.
        bias: whether the convolution has one of its own.
    """

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
    ):
        super().__init__()
        padding = kernel_size // 2
        self.conv = Conv2d(in_chans, out_chans, kernel_size, stride, padding, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The convolution that answers the same in evaluation mode."""
        return fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())


class ResidualDepthwise(ConvNorm):
    """x + bn(conv(x)) with one kernel a channel: maps (B, dim, H, W) -> the same shape.

    Args:
        dim: channels.
        kernel_size: of the convolution, odd.
        drop_path: layer that drops the branch in training.
    """

    def __init__(self, dim: int, kernel_size: int = 3, drop_path: nn.Module | None = None):
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.drop_path = drop_path or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.bn(self.conv(x)))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The convolution that answers the same in evaluation mode: x itself is a 1 at the kernel's centre."""
        conv: Any = super().fuse()
        centre = conv.kernel_size[0] // 2
        conv.weight[:, 0, centre, centre] += 1
        return conv


class ResidualConv(Conv2d):
    """x + conv(x) with one kernel a channel and a bias: maps (B, dim, H, W) -> the same shape.

    Args:
        dim: channels.
        kernel_size: of the convolution, odd.
    """

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolve(x)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The convolution that answers the same, with these weights changed in place: x is a 1 at the centre."""
        size = self.kernel_size[0]
        conv = Conv2d(self.in_channels, self.out_channels, size, padding=size // 2, groups=self.groups)
        conv.weight, conv.bias = self.weight, self.bias
        conv.weight[:, 0, size // 2, size // 2] += 1
        return conv


class NormLinear(nn.Module):
    """BatchNorm before a linear layer: features (B, C) -> (B, C')."""

    def __init__(self, fc: nn.Linear):
        super().__init__()
        self.bn = nn.BatchNorm1d(fc.in_features)
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The linear layer that answers the same in evaluation mode."""
        absorb_norm(self.bn, self.fc)
        return self.fc


@torch.no_grad()
def absorb_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, layer: nn.Linear | nn.Conv2d) -> None:
    """Gives a linear layer, or a 1x1 convolution, weights with which it answers what it did after `norm` in evaluation.

    Nothing else can be: a wider convolution pads with zeros, which the norm would have to leave alone.
    """
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = layer.weight.view(layer.weight.shape[0], -1)
    shift = weight @ (norm.bias - norm.running_mean * scale)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift)
    else:
        layer.bias += shift
    weight *= scale


def fuse_children(module: nn.Module) -> None:
    """Replaces every part of `module` that has a `fuse` by what answers the same in evaluation mode."""
    for name, child in module.named_children():
        if callable(getattr(type(child), "fuse", None)):
            setattr(module, name, child.fuse())
        else:
            fuse_children(child)
