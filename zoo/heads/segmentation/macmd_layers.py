"""Layers of MACMD over one map: dilated convolutions, gates, and the blocks that climb up."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.features import resize

_DILATIONS = (1, 2, 3, 5)


class DilatedContext(nn.Module):
    """HDC: four dilated 3x3 convolutions that exchange quarters of their channels; maps (B, in_chans, H, W) ->
    (B, out_chans, H, W).

    Quarter j of the answer is the sum over i of quarter (j + i) mod 4 of convolution i. Both numbers of channels are
    multiples of 4.
    """

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_chans, out_chans, 3, padding=dilation, dilation=dilation, groups=4) for dilation in _DILATIONS
        )

    def forward(self, x: Tensor) -> Tensor:
        # The channels of convolution i, shifted by i quarters to the front, are what is added to quarter j.
        total = self.branches[0](x)
        quarter = total.shape[1] // 4
        for index in range(1, len(self.branches)):
            total = total + self.branches[index](x).roll(-index * quarter, 1)
        return total


class ContextGate(nn.Module):
    """MCAG: dilated context of a map, weighted by a gate made of itself; (B, dim, H, W) -> the same shape.

    Args:
        dim: channels, a multiple of 4.
        rectified: weight the context after its ReLU instead of before it.
    """

    def __init__(self, dim: int, rectified: bool = False):
        super().__init__()
        self.rectified = rectified
        self.context = nn.Sequential(DilatedContext(dim, dim), nn.BatchNorm2d(dim))
        self.gate = nn.Sequential(nn.Conv2d(dim, 1, 1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x)
        rectified = context.relu()
        return (rectified if self.rectified else context) * self.gate(rectified).sigmoid()


class ChannelGate(nn.Module):
    """x times a weight for each channel, made of the channels' means; (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, dim // reduction)
        self.fc = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, dim, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class SpatialGate(nn.Module):
    """x times a weight for each place, made of the mean and the greatest of its channels' values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class ContextBlock(nn.Module):
    """MEAB: dilated context twice, then both gates; (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.context = nn.Sequential(
            DilatedContext(dim, dim),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            DilatedContext(dim, dim),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )
        self.channel_gate = ChannelGate(dim)
        self.spatial_gate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial_gate(self.channel_gate(self.context(x)))


class UpBlock(nn.Module):
    """1x1, depthwise 9x9 and 1x1 convolutions, then bilinear to a size: (B, in_chans, h, w) -> (B, out_chans, H, W)."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.expand = _conv_norm(in_chans, in_chans)
        self.local = _conv_norm(in_chans, in_chans, 9, in_chans)
        self.project = _conv_norm(in_chans, out_chans)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.expand(x).relu()
        x = nn.functional.silu(self.local(x))
        return resize(self.project(x).relu(), size)


class Fusion(nn.Module):
    """FFB: maps of one size, joined, mixed and gated: (B, in_chans, H, W) -> (B, out_chans, H, W)."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.fuse = nn.Conv2d(in_chans, out_chans, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_chans)
        self.channel_gate = ChannelGate(out_chans)
        self.spatial_gate = SpatialGate()
        self.output = nn.Conv2d(out_chans, out_chans, 1, bias=False)

    def forward(self, *maps: Tensor) -> Tensor:
        x = self.norm(self.fuse(torch.cat(maps, 1)))
        return self.output(self.spatial_gate(self.channel_gate(x)))


def _conv_norm(in_chans: int, out_chans: int, kernel_size: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_chans, eps=1e-6),
    )
