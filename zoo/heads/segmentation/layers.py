"""Small layers that the segmentation heads are made of."""

import torch
from torch import Tensor, nn

from zoo.errors import UsageError


class ConvBlock(nn.Sequential):
    """Convolution without bias, norm, ReLU: maps (B, in_chans, H, W) -> (B, out_chans, H, W).

    Args:
        in_chans, out_chans: channels.
        kernel_size: odd.
        norm: BatchNorm unless given.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int = 1, norm: nn.Module | None = None):
        super().__init__(
            nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False),
            norm or nn.BatchNorm2d(out_chans),
            nn.ReLU(inplace=True),
        )


class BinMeans(nn.Module):
    """Means over `bins` x `bins` parts of a map, (B, C, H, W) -> (B, C, bins, bins): adaptive average pooling.

    As products with two small matrices, because a graph of any size cannot hold torch's own.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weights(x.shape[2], x)
        columns = self.weights(x.shape[3], x)
        return (rows @ x.float() @ columns.T).to(x.dtype)

    def weights(self, length: int, like: Tensor) -> Tensor:
        """(bins, length): each row the weights of one bin, from floor(i * length / bins) up to, not with,
        ceil((i + 1) * length / bins)."""
        places = torch.arange(length, device=like.device)
        bins = torch.arange(self.bins, device=like.device)[:, None]
        inside = (places >= bins * length // self.bins) & (
            places < (bins * length + length + self.bins - 1) // self.bins
        )
        return inside.float() / inside.float().sum(1, keepdim=True)


def check_share(name: str, value: float) -> None:
    """Raises UsageError unless a rate of dropout is in [0, 1)."""
    if not 0 <= value < 1:
        raise UsageError(f"{name}={value}: a share lies in [0, 1)")


def check_width(name: str, value: int, multiple: int = 1) -> None:
    """Raises UsageError unless a number of channels is a positive multiple."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % multiple:
        what = "a positive number" if multiple == 1 else f"a positive multiple of {multiple}"
        raise UsageError(f"{name}={value}: give {what}")
