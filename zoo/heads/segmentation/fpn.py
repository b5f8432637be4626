"""The semantic branch of a feature pyramid network.

Panoptic Feature Pyramid Networks, Kirillov et al., CVPR 2019 - https://arxiv.org/abs/1901.02446, section 3.1
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.features import resize
from zoo.heads.segmentation.base import SegmentationHead
from zoo.heads.segmentation.layers import ConvBlock, check_share, check_width

_GROUPS = 32


class FPN(SegmentationHead):
    """Each map, joined with the coarser ones, climbs to the finest one's size by blocks that double it; then a sum.

    Args:
        channels: of the maps.
        num_classes: of the logits.
        pyramid_channels: width of the joined maps.
        hidden_channels: width of the climb, a multiple of the 32 groups of its norm; with 32 every group is one
            channel, and a map of 1 x 1 has nothing to norm it by.
        dropout: of whole channels before the classifier.

    Raises:
        UsageError: a width or the dropout does not fit.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        pyramid_channels: int = 256,
        hidden_channels: int = 128,
        dropout: float = 0.2,
    ):
        super().__init__()
        check_width("pyramid_channels", pyramid_channels)
        check_width("hidden_channels", hidden_channels, _GROUPS)
        check_share("dropout", dropout)
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid_channels, 1) for width in channels)
        self.climbs = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(
                    pyramid_channels if step == 0 else hidden_channels,
                    hidden_channels,
                    3,
                    nn.GroupNorm(_GROUPS, hidden_channels),
                )
                for step in range(max(1, level))
            )
            for level in range(len(channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden_channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """See `SegmentationHead.forward`."""
        joined = [lateral(map_) for lateral, map_ in zip(self.lateral, features, strict=True)]
        for level in range(len(joined) - 2, -1, -1):
            finer = joined[level]
            joined[level] = finer + F.interpolate(joined[level + 1], size=finer.shape[2:], mode="nearest")
        total = None
        climb: Any
        for level, (map_, climb) in enumerate(zip(joined, self.climbs, strict=True)):
            for step, block in enumerate(climb):
                map_ = block(map_)
                if level > 0:
                    map_ = resize(map_, features[level - 1 - step].shape[2:])
            total = map_ if total is None else total + map_
        return resize(self.classifier(self.dropout(total)), size)
