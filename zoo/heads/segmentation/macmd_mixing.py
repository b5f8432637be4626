"""Layers of MACMD over several maps: what they agree on at the finest size, and channels mixed across them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.features import resize


class UpConv(nn.Module):
    """Nearest to a size, depthwise 3x3 convolution, BatchNorm, ReLU, 1x1: (B, dim, h, w) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.project(self.norm(self.local(nearest(x, size))).relu())


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbours: (B, C, h, w) -> (B, C, *size). In whole numbers, because torch and other runtimes round
    where a place falls on the border of two."""
    rows, columns = (
        torch.arange(wanted, device=x.device) * given // wanted for wanted, given in zip(size, x.shape[2:], strict=True)
    )
    return x.index_select(2, rows).index_select(3, columns)


class Agreement(nn.Module):
    """APM: the mean of several maps, each weighted by how it agrees with their weighted sum.

    Maps (B, C_i, h_i, w_i), finest first -> (B, dim, h_0, w_0).

    Args:
        channels: of the maps.
        dim: of the answer.
        fresh: bring the coarser maps up with new random weights every time, as the published program does.
    """

    def __init__(self, channels: Sequence[int], dim: int, fresh: bool = False):
        super().__init__()
        hidden = max(1, dim // 8)
        self.dim = dim
        self.project = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True))
            for width in channels
        )
        self.climb = None if fresh else nn.ModuleList(UpConv(dim) for _ in channels[1:])
        self.score = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1))
        self.modulate = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [project(map_) for project, map_ in zip(self.project, features, strict=True)]
        size = maps[0].shape[2:]
        fresh = self.climb is None
        climb: Any = [UpConv(self.dim).to(maps[0]) for _ in maps[1:]] if fresh else self.climb
        maps = [maps[0], *(up(map_, size) for up, map_ in zip(climb, maps[1:], strict=True))]
        weights = torch.cat([self.score(map_) for map_ in maps], 1).float().softmax(1).to(maps[0].dtype)
        pooled = sum(weights[:, index : index + 1] * map_ for index, map_ in enumerate(maps))
        gated = [self.modulate(map_.sigmoid() * pooled * pooled.sigmoid() * map_).sigmoid() * map_ for map_ in maps]
        return sum(gated) / len(gated)


class ChannelMixer(nn.Module):
    """VRWKV's channel mix over a grid, channels last: (B, H, W, dim) -> the same shape.

    Vision-RWKV, Duan et al. - https://arxiv.org/abs/2403.02308, section 3.3
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mix_key = nn.Parameter(torch.full((dim,), 0.5))
        self.mix_receptance = nn.Parameter(torch.full((dim,), 0.5))
        self.key = nn.Linear(dim, 2 * dim, bias=False)
        self.key_norm = nn.LayerNorm(2 * dim)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shifted = quarter_shift(x)
        key = self.key(torch.lerp(shifted, x, self.mix_key.to(x.dtype)))
        key = self.key_norm(key.relu().square())
        receptance = self.receptance(torch.lerp(shifted, x, self.mix_receptance.to(x.dtype)))
        return receptance.sigmoid() * self.value(key)


def quarter_shift(x: Tensor) -> Tensor:
    """(B, H, W, C): a quarter of the channels takes the value of the place to the left, the next that to the right, the
    next that above, the rest that below; 0 beyond the edge."""
    quarter = x.shape[3] // 4
    # Cuts of the map with a rim of zeros around it.
    height, width = x.shape[1], x.shape[2]
    rim = F.pad(x, (0, 0, 1, 1, 1, 1))
    left, right = rim[:, 1:-1, :width, :quarter], rim[:, 1:-1, 2:, quarter : 2 * quarter]
    above, below = rim[:, :height, 1:-1, 2 * quarter : 3 * quarter], rim[:, 2:, 1:-1, 3 * quarter :]
    return torch.cat([left, right, above, below], 3)


class CrossScaleMixer(nn.Module):
    """MSCCM: maps brought to one grid and one width, their channels mixed together, and brought back.

    Maps (B, C_i, h_i, w_i) -> maps of the same shapes.

    Args:
        channels: of the maps.
        dim: width of each.
        drop_path: how often the mixing of an image is left out in training.
        side: of the square grid; None is the greatest grid of the maps.
    """

    def __init__(self, channels: Sequence[int], dim: int, drop_path: float = 0.05, side: int | None = None):
        super().__init__()
        self.dim, self.side = dim, side
        self.project = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in channels)
        self.mixer = ChannelMixer(dim * len(channels))
        self.norm = nn.LayerNorm(dim * len(channels))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.restore = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        # The last map is the finest.
        grid = features[-1].shape[2:] if self.side is None else (self.side, self.side)
        maps = [project(resize(map_, grid)) for project, map_ in zip(self.project, features, strict=True)]
        x = torch.cat(maps, 1).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.norm(self.mixer(x)))
        parts = x.permute(0, 3, 1, 2).split(self.dim, 1)
        return [
            resize(restore(part), map_.shape[2:])
            for restore, part, map_ in zip(self.restore, parts, features, strict=True)
        ]
