"""Which tested images a report shows: the worst and the best of every kind, small copies, never more than it needs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.tiling import resize

# What a reader looks for first comes first.
GROUPS = {
    "worst_defect": "Defects with the lowest scores",
    "worst_good": "Good images with the highest scores",
    "best_defect": "Defects with the highest scores",
    "best_good": "Good images with the lowest scores",
}


@dataclass(frozen=True)
class Example:
    """A tested image to look at, at most a side long.

    image: uint8 (H, W) or (H, W, 3). map: float32 (H, W). mask: bool (H, W), None where nobody drew one.
    """

    path: str
    kind: str
    defective: bool
    score: float
    image: np.ndarray
    map: np.ndarray
    mask: np.ndarray | None


class Gallery:
    """Keeps `limit` examples of every group and kind; every other image is let go at once.

    Args:
        limit: pictures of a group.
        side: longest side of a kept copy in pixels.
    """

    def __init__(self, limit: int = 6, side: int = 480):
        self.limit, self.side = limit, side
        self._kept: dict[tuple[str, str], list[tuple[float, Example]]] = defaultdict(list)

    def offer(
        self, path: str, kind: str, defective: bool, score: float, image: Tensor, map: Tensor, mask: Tensor | None
    ) -> None:
        """Keeps small copies of one image (C, H, W), uint8 or in [0, 1], its map (H, W) and mask bool (H, W), if they
        belong to the worst or the best so far."""
        what = "defect" if defective else "good"
        example = None
        # Bad detection first: of defects low scores are the worst, of good images high ones.
        for group, key in ((f"worst_{what}", score), (f"best_{what}", -score)):
            key = key if defective else -key
            kept = self._kept[group, kind]
            if len(kept) == self.limit and key >= kept[-1][0]:
                continue
            if example is None:
                example = Example(path, kind, defective, score, *self._small(image, map, mask))
            kept.append((key, example))
            kept.sort(key=lambda entry: (entry[0], entry[1].path))
            del kept[self.limit :]

    def __len__(self) -> int:
        """Examples that are held now."""
        return sum(len(kept) for kept in self._kept.values())

    def state(self) -> list[tuple[str, str, float, Example]]:
        """All that is kept, to be handed to another process."""
        return [(group, kind, key, example) for (group, kind), kept in self._kept.items() for key, example in kept]

    def merge(self, states: Sequence[list[tuple[str, str, float, Example]]]) -> None:
        """Takes in what other processes kept; an image that several have seen counts once."""
        seen = {(group, kind, entry[1].path) for (group, kind), kept in self._kept.items() for entry in kept}
        for group, kind, key, example in (entry for state in states for entry in state):
            if (group, kind, example.path) not in seen:
                seen.add((group, kind, example.path))
                self._kept[group, kind].append((key, example))
        for kept in self._kept.values():
            kept.sort(key=lambda entry: (entry[0], entry[1].path))
            del kept[self.limit :]

    def chosen(self) -> dict[str, list[Example]]:
        """Group -> at most `limit` examples, all kinds in turn, none twice; groups without any are left out."""
        found: dict[str, list[Example]] = {}
        shown: set[str] = set()
        for group in GROUPS:
            queues = [[e for _, e in kept] for (name, _), kept in sorted(self._kept.items()) if name == group]
            in_turn = [e for turn in zip_longest(*queues) for e in turn if e is not None and e.path not in shown]
            if in_turn:
                downwards = group in ("worst_good", "best_defect")
                found[group] = sorted(in_turn[: self.limit], key=lambda e: e.score, reverse=downwards)
                shown |= {e.path for e in found[group]}
        return found

    def _small(self, image: Tensor, map: Tensor, mask: Tensor | None) -> tuple:
        height, width = map.shape[-2:]
        scale = min(1.0, self.side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = image.detach().float() / (255 if image.dtype == torch.uint8 else 1)
        if tuple(image.shape[-2:]) != size:
            image = resize(image[None], size)[0]
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        picture = image[:3].permute(1, 2, 0).numpy() if len(image) >= 3 else image[0].numpy()
        # The largest value of a block: a defect of one pixel stays in the picture.
        small = F.adaptive_max_pool2d(map.detach().float()[None], size)[0].cpu().numpy()
        if mask is None:
            return picture.copy(), small, None
        inside = F.adaptive_max_pool2d(mask.detach().float()[None], size)[0].cpu().numpy() > 0
        return picture.copy(), small, inside
