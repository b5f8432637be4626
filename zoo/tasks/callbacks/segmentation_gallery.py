"""Which images a report of segmentation shows: the worst and the best, small copies, never more than it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = {"worst": "Images with the lowest mIoU", "best": "Images with the highest mIoU"}


@dataclass(frozen=True)
class Example:
    """An image to look at, at most a side long.

    image: uint8 (H, W) or (H, W, 3). truth, predicted: int64 (H, W), class numbers; the truth also `ignore_index`.
    """

    path: str
    miou: float
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


class Gallery:
    """Keeps `limit` of the worst and of the best images; every other one is let go at once.

    An image is judged by the mean IoU of the classes that it or its prediction shows.

    Args:
        side: longest side of a kept copy in pixels.
    """

    def __init__(self, num_classes: int, ignore_index: int, limit: int = 6, side: int = 480):
        self.num_classes, self.ignore_index, self.limit, self.side = num_classes, ignore_index, limit, side
        self._kept: dict[str, list[Example]] = {group: [] for group in GROUPS}

    def offer(self, paths: Sequence[str], images: Tensor, truth: Tensor, predicted: Tensor) -> None:
        """Takes images (B, C, H, W), uint8 or in [0, 1], with their true and predicted classes (B, H, W)."""
        scores = image_miou(predicted, truth, self.num_classes, self.ignore_index).tolist()
        for i, (path, score) in enumerate(zip(paths, scores, strict=True)):
            if math.isnan(score):  # no pixel has a class
                continue
            example = None
            for group, kept in self._kept.items():
                if len(kept) == self.limit and _key(group, score, path) >= _key(group, kept[-1].miou, kept[-1].path):
                    continue
                if example is None:
                    example = Example(path, score, *self._small(images[i], truth[i], predicted[i]))
                self._add(group, [example])

    def __len__(self) -> int:
        """Examples that are held now."""
        return sum(len(kept) for kept in self._kept.values())

    def state(self) -> dict[str, list[Example]]:
        """All that is kept, to be handed to another process."""
        return self._kept

    def merge(self, states: Sequence[dict[str, list[Example]]]) -> None:
        """Takes in what other processes kept; an image that several have seen counts once."""
        for group, kept in self._kept.items():
            mine = {example.path for example in kept}
            others = {e.path: e for state in states for e in state[group] if e.path not in mine}
            self._add(group, list(others.values()))

    def chosen(self) -> dict[str, list[Example]]:
        """Group -> examples, none twice; groups without any are left out."""
        worst = self._kept["worst"]
        shown = {example.path for example in worst}
        best = [example for example in self._kept["best"] if example.path not in shown]
        return {group: found for group, found in (("worst", worst), ("best", best)) if found}

    def _add(self, group: str, examples: Sequence[Example]) -> None:
        kept = self._kept[group]
        kept.extend(examples)
        kept.sort(key=lambda example: _key(group, example.miou, example.path))
        del kept[self.limit :]

    def _small(self, image: Tensor, truth: Tensor, predicted: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        height, width = truth.shape
        scale = min(1.0, self.side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = image.detach().float() / (255 if image.dtype == torch.uint8 else 1)
        if size != (height, width):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        picture = image[:3].permute(1, 2, 0).numpy() if len(image) >= 3 else image[0].numpy()
        # Of each block the class at its middle: between two classes lies no third.
        rows, columns = (
            ((torch.arange(to, device=truth.device) + 0.5) * (of / to)).long()
            for to, of in zip(size, (height, width), strict=True)
        )
        labels = [part[rows[:, None], columns].cpu().numpy() for part in (truth, predicted)]
        return picture.copy(), labels[0], labels[1]


def image_miou(predicted: Tensor, truth: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Of each image (B,) the mean IoU of the classes that it or its prediction shows, float64; NaN without any."""
    valid = truth != ignore_index
    number = torch.arange(len(truth), device=truth.device)[:, None, None] * num_classes**2
    places = (number + truth * num_classes + predicted)[valid]
    counts = torch.bincount(places, minlength=len(truth) * num_classes**2).view(-1, num_classes, num_classes).double()
    right = counts.diagonal(dim1=1, dim2=2)
    return (right / (counts.sum(1) + counts.sum(2) - right)).nanmean(1)


def _key(group: str, miou: float, path: str) -> tuple[float, str]:
    return (miou if group == "worst" else -miou), path
