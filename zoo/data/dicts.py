"""Batches as dicts: a loader of samples with names, and what stands for a sample that could not be read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from zoo.data.sampler import ResumableLoader, Unreadable
from zoo.errors import UsageError


class Refused(NamedTuple):
    """Takes the place of a sample that no skipping may hide: its mask contradicts its image."""

    message: str


class DictLoader(ResumableLoader):
    """Batches as dicts: images and masks stacked, labels and has_mask as tensors, texts as lists.

    Args:
        always: put into every batch as they are.
    """

    def __init__(self, *args: Any, always: dict[str, Any] | None = None, **arguments: Any):
        super().__init__(*args, collate_batch=collate_dicts, **arguments)
        self.always = always or {}

    def __iter__(self):
        for batch, _ in super().__iter__():
            if isinstance(batch, Refused):
                raise UsageError(batch.message)
            yield batch | self.always


def collate_dicts(samples: Sequence[Any]) -> tuple[dict[str, Any] | Refused, list[str], list[Unreadable]]:
    """(batch, paths of its images, the samples that could not be read and are left out)."""
    refused = [sample for sample in samples if isinstance(sample, Refused)]
    if refused:
        return refused[0], [""], []
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    return (default_collate(good) if good else {}), [sample["path"] for sample in good], bad


def unreadable(path: str, error: Exception) -> Unreadable:
    """What stands for an image that raised `error`."""
    return Unreadable(path, " ".join(str(error).split()) or type(error).__name__)


def as_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (C, H, W) of (H, W, C)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
