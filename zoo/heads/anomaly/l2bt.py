"""L2BT: two small students learn how a transformer maps one of its layers to another and back, on good images alone.

Where an image is not normal the students do not follow.
Learning to Be a Transformer to Pinpoint Anomalies, Costanzino et al., IEEE Access 2025.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import UsageError
from zoo.heads.anomaly.base import AnomalyHead, AnomalyOutput
from zoo.heads.anomaly.maps import box_means, resize, top_mean


class Student(nn.Module):
    """Three linear layers with GELU between them, half as wide as input and output together: (..., C) -> (..., C')."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        hidden = (dim + dim_out) // 2
        self.input = nn.Linear(dim, hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.projection(F.gelu(self.input(x)))))


class L2BT(AnomalyHead):
    """Distance of two students from the teacher's features, multiplied.

    Args:
        channels: of the two maps, the earlier layer's first.
        smooth: the paper's box means over the map, in pixels of the image.
        top: share of the pixels, the highest, whose mean is the score.

    Raises:
        UsageError: there are not two maps, or `top` is no share.
    """

    needs_gradient = True

    def __init__(self, channels: Sequence[int], smooth: bool = True, top: float = 0.001):
        super().__init__()
        if len(channels) != 2:
            raise UsageError(f"l2bt maps one layer to another: give two layers, not {len(channels)}")
        if not 0 <= top <= 1:
            raise UsageError(f"top={top}: a share of the pixels lies in [0, 1]")
        self.smooth, self.top = smooth, top
        self.forward_net = Student(channels[0], channels[1])
        self.backward_net = Student(channels[1], channels[0])

    def tokens(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Two maps (B, C, h, w) as tokens (B, H*W, C) of the finer grid."""
        early, late = features
        grid = (max(early.shape[2], late.shape[2]), max(early.shape[3], late.shape[3]))
        early, late = (resize(map_, grid).flatten(2).transpose(1, 2) for map_ in (early, late))
        return early, late

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        early, late = self.tokens(features)
        return cosine_loss(self.forward_net(early), late) + cosine_loss(self.backward_net(late), early)

    def distances(self, early: Tensor, late: Tensor) -> Tensor:
        """Tokens (B, N, C), (B, N, C') -> (B, N): the product of how far both students are off, on unit spheres."""
        back = F.normalize(self.backward_net(late), dim=-1) - F.normalize(early, dim=-1)
        there = F.normalize(self.forward_net(early), dim=-1) - F.normalize(late, dim=-1)
        return back.norm(dim=-1) * there.norm(dim=-1)

    def detect(self, features: Sequence[Tensor], size: tuple[int, int]) -> AnomalyOutput:
        early, late = self.tokens(features)
        height = max(map_.shape[2] for map_ in features)
        maps = self.distances(early, late).unflatten(1, (height, -1)).unsqueeze(1)
        maps = resize(maps, size)
        maps = box_means(maps) if self.smooth else maps
        return AnomalyOutput(top_mean(maps, self.top), maps)


def cosine_loss(answer: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine over channels, of (B, N, C)."""
    return 1 - F.cosine_similarity(answer.float(), target.float(), dim=-1, eps=1e-6).mean()
