"""From distances on the teacher's grid to maps of the image, and from maps to scores."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, (B, C, h, w) -> (B, C, *size)."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def box_means(maps: Tensor) -> Tensor:
    """Five means over 5 x 5 places and three over 7 x 7, zeros beyond the border, of (B, 1, H, W).

    Source: Costanzino et al., "Learning to Be a Transformer to Pinpoint Anomalies", IEEE Access 2025.
    """
    for side in (5,) * 5 + (7,) * 3:
        maps = F.avg_pool2d(maps, side, stride=1, padding=side // 2)
    return maps


def gaussian(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels, four of them wide, the border repeated, of (B, 1, H, W)."""
    reach = max(1, round(4 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = kernel / kernel.sum()
    maps = F.conv2d(F.pad(maps, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return F.conv2d(F.pad(maps, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None, :])


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the largest `share` of the places of each map (B, 1, H, W), of one at least: (B,)."""
    flat = maps.flatten(1)
    return flat.topk(max(1, int(share * flat.shape[1])), dim=1).values.mean(dim=1)
