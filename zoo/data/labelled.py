"""Samples as a loader asks for them: reproducible one by one, and never an exception for a damaged file."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.sampler import Unreadable, mix, split_key
from zoo.data.sources import Source
from zoo.errors import UsageError, unknown


class Samples(Dataset):
    """Samples by (epoch, index), with `Unreadable` for a damaged file.

    Attributes:
        seed: of random choices; None in evaluation.
    """

    seed: int | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        raise NotImplementedError

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> list[Any]:
        samples = [self[key] for key in keys]
        if self.seed is None or not all(isinstance(sample, Unreadable) for sample in samples):
            return samples
        # Lightning does not validate after an epoch that is a batch short, and other ranks would wait for the batch:
        # so in training, and only there, the next readable image takes the place of a whole batch.
        epoch, index = split_key(keys[-1])
        for step in range(1, len(self)):
            samples.append(self[epoch, (index + step) % len(self)])
            if not isinstance(samples[-1], Unreadable):
                break
        return samples


class LabelledImages(Samples):
    """(uint8 image (C, H, W), class number) for (epoch, index); random choices depend on (seed, epoch, index) alone."""

    def __init__(self, source: Source, numbers: Sequence[int], transform: Callable, in_chans: int, seed: int | None):
        self.source, self.numbers, self.transform = source, numbers, transform
        self.in_chans, self.seed = in_chans, seed

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, int] | Unreadable:
        epoch, index = split_key(key)
        number = self.numbers[index]
        try:
            image, target = self.source.load(number, self.in_chans)
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return Unreadable(self.source.name(number), " ".join(str(error).split()) or type(error).__name__)
        if self.seed is not None:
            seed_all(mix("sample", self.seed, epoch, number))
        return self.transform(image), target


def check_reading(given: Any, layouts: Iterable[str]) -> None:
    """Raises UsageError for a value out of its range, of those that data from folders with masks has in common."""
    if given.in_chans not in (1, 3):
        raise UsageError(f"in_chans={given.in_chans}: images are read with 3 channels, or 1 for grey")
    for name, valid in (("layout", ("auto", *layouts)), ("on_error", ("skip", "raise"))):
        if given[name] not in valid:
            raise unknown(name, given[name], valid)
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if given[name] < least:
            raise UsageError(f"{name}={given[name]}: it must be {least} or more")
    if given.val_split is not None and not 0 < given.val_split < 1:
        raise UsageError(f"val_split={given.val_split}: a share of the images lies between 0 and 1")
    for name in ("hflip", "vflip"):
        if not 0 <= given[name] <= 1:
            raise UsageError(f"{name}={given[name]}: a probability lies between 0 and 1")
    if not 0 <= given.rotate <= 180:
        raise UsageError(f"rotate={given.rotate}: degrees lie between 0 and 180")
    for name in ("brightness", "contrast"):
        if not 0 <= given[name] < 1:
            raise UsageError(f"{name}={given[name]}: a change lies between 0 (off) and 1")


def leave_out(skipped: dict[str, str], on_error: str, name: str, reason: str) -> None:
    """Notes an image that cannot be read in `skipped`, with a warning the first time.

    Raises:
        UsageError: `on_error` is "raise".
    """
    if on_error == "raise":
        raise UsageError(
            f"{name} cannot be read: {reason}. Mend or remove it, or use --data.on_error skip to leave such images out"
        )
    if name not in skipped:
        skipped[name] = reason
        rank_zero_warn(f"left out, cannot be read: {name} ({reason})")


def seed_all(seed: int) -> None:
    """timm's transforms draw from Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed looks for every kind of device, which takes longer than decoding a small image.
    torch.default_generator.manual_seed(seed)
