"""UPerNet: a pyramid pooling module on the coarsest map, a feature pyramid network down to the finest, all joined.

Unified Perceptual Parsing for Scene Understanding, Xiao et al., ECCV 2018 - https://arxiv.org/abs/1807.10221,
section 3.1; the pooling is that of Pyramid Scene Parsing Network, Zhao et al. - https://arxiv.org/abs/1612.01105
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import UsageError
from zoo.features import resize
from zoo.heads.segmentation.base import SegmentationHead
from zoo.heads.segmentation.layers import BinMeans, ConvBlock, check_share, check_width


class PyramidPooling(nn.Module):
    """A map beside its means over bins of several sizes: (B, in_chans, H, W) -> (B, out_chans, H, W)."""

    def __init__(self, in_chans: int, out_chans: int, bins: Sequence[int]):
        super().__init__()
        # GroupNorm of one group: one place an image and a batch of one leave BatchNorm nothing to count.
        self.pools = nn.ModuleList(
            nn.Sequential(BinMeans(count), ConvBlock(in_chans, out_chans, 1, nn.GroupNorm(1, out_chans)))
            for count in bins
        )
        self.fuse = ConvBlock(in_chans + len(bins) * out_chans, out_chans, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat([x, *(resize(pool(x), x.shape[2:]) for pool in self.pools)], 1))


class UPerNet(SegmentationHead):
    """See the module's first line.

    Args:
        channels: of the maps.
        num_classes: of the logits.
        hidden_channels: width of the pyramid; the paper's is 512.
        bins: sides of the grids of means over the coarsest map.
        dropout: of whole channels before the classifiers.
        deep_supervision: logits of the second coarsest map too, in training.

    Raises:
        UsageError: a width, the bins or the dropout do not fit.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        hidden_channels: int = 256,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        deep_supervision: bool = False,
    ):
        super().__init__()
        check_width("hidden_channels", hidden_channels)
        check_share("dropout", dropout)
        if not isinstance(bins, Sequence):
            raise UsageError(f"bins={bins}: give a list of sides, for instance [1, 2, 3, 6]")
        for count in bins:
            check_width("bins", count)
        width = hidden_channels
        self.pooling = PyramidPooling(channels[-1], width, bins)
        self.lateral = nn.ModuleList(ConvBlock(chans, width) for chans in channels[:-1])
        self.smooth = nn.ModuleList(ConvBlock(width, width, 3) for _ in channels[:-1])
        self.fuse = ConvBlock(len(channels) * width, width, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))
        self.auxiliary = None
        if deep_supervision:
            last = channels[max(0, len(channels) - 2)]
            self.auxiliary = nn.Sequential(
                ConvBlock(last, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1)
            )

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor | list[Tensor]:
        """See `SegmentationHead.forward`."""
        maps = [lateral(map_) for lateral, map_ in zip(self.lateral, features[:-1], strict=True)]
        maps.append(self.pooling(features[-1]))
        for level in range(len(maps) - 2, -1, -1):
            maps[level] = maps[level] + resize(maps[level + 1], maps[level].shape[2:])
        maps = [smooth(map_) for smooth, map_ in zip(self.smooth, maps[:-1], strict=True)] + maps[-1:]
        finest = maps[0].shape[2:]
        joined = torch.cat([maps[0], *(resize(map_, finest) for map_ in maps[1:])], 1)
        logits = resize(self.classifier(self.fuse(joined)), size)
        if self.training and self.auxiliary is not None:
            return [logits, resize(self.auxiliary(features[max(0, len(features) - 2)]), size)]
        return logits
