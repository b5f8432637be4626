"""Small images decoded once and kept in memory, cropped and flipped on the device.

Reading a 32 x 32 JPEG again costs a worker far longer than training on it costs a GPU; a data set that fits in memory
need not be read twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.sampler import ResumableLoader, collate, split_key
from zoo.errors import UsageError


class PreloadedImages(Dataset):
    """uint8 images (N, C, H, W) and their class numbers (N,); a batch is one look-up."""

    def __init__(self, images: Tensor, targets: Tensor):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> tuple[Tensor, Tensor, list]:
        index = torch.tensor([split_key(key)[1] for key in keys])
        return self.images[index], self.targets[index], []


def preload(images: Dataset, num_workers: int, on_unreadable: Callable[[str, str], None]) -> PreloadedImages:
    """Reads every item (uint8 image, class number) of `images` once.

    Raises:
        UsageError: the images have more than one size, or none can be read.
    """
    sizes: set[tuple[int, ...]] = set()
    batches: list[Tensor] = []
    targets: list[Tensor] = []
    loader: Any = DataLoader(
        images,
        batch_size=256,
        sampler=[(0, number) for number in range(len(images))],  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_collate_sizes,
    )
    for found, batch, unreadable in loader:
        for name, reason in unreadable:
            on_unreadable(name, reason)
        sizes |= found
        if len(sizes) > 1:
            few = ", ".join(f"{height} x {width}" for _, height, width in sorted(sizes)[:3])
            raise UsageError(f"preload keeps images of one size, but there are {few}; use --data.preload false")
        if batch is not None:
            batches.append(batch[0])
            targets.append(batch[1])
    if not batches:
        raise UsageError("none of the images to train on can be read")
    return PreloadedImages(torch.cat(batches), torch.cat(targets))


def _collate_sizes(samples: Sequence[Any]) -> tuple[set, tuple[Tensor, Tensor] | None, list]:
    good = [sample for sample in samples if isinstance(sample[0], Tensor)]
    bad = [sample for sample in samples if not isinstance(sample[0], Tensor)]
    sizes = {tuple(image.shape) for image, _ in good}
    batch = collate(good)[:2] if len(sizes) == 1 else None
    return sizes, batch, bad


class PreloadedLoader(ResumableLoader):
    """A `ResumableLoader` over `PreloadedImages`: no workers, whole batches."""

    def __init__(self, images: PreloadedImages, **arguments: Any):
        super().__init__(images, collate_batch=lambda batch: batch, **arguments)


def random_crop_flip(
    images: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    bicubic: bool,
    seed: int,
) -> Tensor:
    """A random part of each image, perhaps mirrored, at `size`: a function of `seed` alone.

    Args:
        images: float (B, C, h, w), no larger than about `size` (nothing is smoothed before it is made smaller).
        size: height and width of the answer.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        hflip: probability of mirroring.
        bicubic: bicubic instead of bilinear interpolation.

    Returns:
        (B, C, *size), within [0, 1].
    """
    batch, _, height, width = images.shape
    drawn = torch.rand(5, batch, generator=torch.Generator().manual_seed(seed))
    area = (scale[0] + (scale[1] - scale[0]) * drawn[0]) * height * width
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * drawn[1])
    wide = ((area * aspect).sqrt() / width).clamp(max=1)
    high = ((area / aspect).sqrt() / height).clamp(max=1)
    right, down = (2 * drawn[2] - 1) * (1 - wide), (2 * drawn[3] - 1) * (1 - high)
    sign = torch.where(drawn[4] < hflip, -1.0, 1.0)
    zero = torch.zeros(batch)
    theta = torch.stack([wide * sign, zero, right, zero, high, down], dim=1).view(batch, 2, 3)
    theta = theta.to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, [batch, images.shape[1], *size], align_corners=False)
    mode = "bicubic" if bicubic else "bilinear"
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False).clamp_(0, 1)
