"""The decoder of SegFormer: linear layers alone.

SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers, Xie et al., NeurIPS 2021 -
https://arxiv.org/abs/2105.15203, section 3.2
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.features import resize
from zoo.heads.segmentation.base import SegmentationHead
from zoo.heads.segmentation.layers import ConvBlock, check_share, check_width


class SegFormer(SegmentationHead):
    """Each map to one width by a linear layer, to the finest one's size, joined, mixed by another.

    Args:
        channels: of the maps.
        num_classes: of the logits.
        embed_dim: the width; the paper's is 256 for its small networks and 768 for the others.
        dropout: of whole channels before the classifier.

    Raises:
        UsageError: the width or the dropout does not fit.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, embed_dim: int = 256, dropout: float = 0.1):
        super().__init__()
        check_width("embed_dim", embed_dim)
        check_share("dropout", dropout)
        # A 1x1 convolution is a linear layer over the channels.
        self.project = nn.ModuleList(nn.Conv2d(width, embed_dim, 1) for width in channels)
        self.fuse = ConvBlock(len(channels) * embed_dim, embed_dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(embed_dim, num_classes, 1)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """See `SegmentationHead.forward`."""
        finest = features[0].shape[2:]
        maps = [resize(project(map_), finest) for project, map_ in zip(self.project, features, strict=True)]
        # Coarsest first, as the paper's program joins them.
        return resize(self.classifier(self.dropout(self.fuse(torch.cat(maps[::-1], 1)))), size)
