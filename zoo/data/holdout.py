"""Images set apart from those to train on, so that no near copy of them stays behind.

Photos of a production line come in series: several exposures of a part, neighbouring frames, a part seen twice. A
random share of them has its twins in train, looks better than any new photo will, and makes the threshold too low.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from zoo.data.masks import size_of
from zoo.errors import UsageError

_THUMB = 32  # pixels
_GROUPS = 6  # at least, in a share: one series alone would not stand for what is normal
_NEIGHBOURS = 8  # of each image that it may be grouped with
# Pixels to decode, beyond which series are not looked for: about half a minute.
_COSTLY = 3e9


class HasPath(Protocol):
    """Whatever has the path of an image."""

    @property
    def path(self) -> str: ...


T = TypeVar("T", bound=HasPath)


def hold_out(photos: list[T], share: float, purpose: str, kind: str = "good images") -> tuple[list[T], list[T]]:
    """(the rest, about `share` of the images), at least one image each, the same for every seed; images that look
    nearly the same go together.

    Args:
        purpose, kind: for messages: what they are held out for, and what they are.

    Raises:
        UsageError: nothing is left to train on.
    """
    count = max(1, round(share * len(photos)))
    if count >= len(photos):
        folder = photos[0].path.rpartition("/")[0]
        raise UsageError(
            f"a share of {share} for {purpose} of {len(photos)} {kind} leaves nothing to train on; add {kind} "
            f"to {folder!r} (some dozens at least)"
        )
    groups = group_alike(photos, largest=count // _GROUPS)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    held: set[int] = set()
    for number in order:
        if len(held) + len(groups[number]) <= count:
            held.update(groups[number])
    return [p for n, p in enumerate(photos) if n not in held], [p for n, p in enumerate(photos) if n in held]


def group_alike(photos: Sequence[HasPath], largest: int) -> list[list[int]]:
    """Numbers of images in groups of up to `largest`, made by joining the most alike first; images alone where series
    are too small to matter or would take too long to find.
    """
    alone = [[number] for number in range(len(photos))]
    if largest < 2 or sum(_cost(photo.path) for photo in photos) > _COSTLY:
        return alone
    thumbs = np.stack([_thumb(photo.path) for photo in photos]).astype(np.float64)
    edges = []
    for first in range(0, len(thumbs), 256):
        # Products of small whole numbers are exact in any order of summation: the same groups on every machine.
        likeness = thumbs[first : first + 256] @ thumbs.T
        rows = np.arange(len(likeness))
        likeness[rows, first + rows] = -np.inf
        near = np.argsort(-likeness, axis=1, kind="stable")[:, :_NEIGHBOURS]
        edges += [(-likeness[row, other], *sorted((first + row, int(other)))) for row in rows for other in near[row]]
    group_of = dict(enumerate(alone))
    for _, one, other in sorted(edges):
        a, b = group_of[one], group_of[other]
        if a is not b and len(a) + len(b) <= largest:
            a += b
            group_of.update(dict.fromkeys(b, a))
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def _cost(path: str) -> float:
    """Pixels to decode; a JPEG is decoded at an eighth of its size."""
    try:
        height, width = size_of(path)
    except Exception:  # damaged: reading reports it
        return 0
    return height * width / (64 if path.lower().endswith((".jpg", ".jpeg")) else 1)


def _thumb(path: str) -> np.ndarray:
    """What is fine in a small grey version, standardised, in whole numbers; nothing for a damaged image."""
    try:
        with Image.open(path) as image:
            image.draft("L", (2 * _THUMB, 2 * _THUMB))
            grey = np.asarray(image.convert("F").resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.float64)
    except Exception:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
        return np.zeros(_THUMB**2, np.int64)
    coarse = Image.fromarray(grey.astype(np.float32)).resize((4, 4), Image.Resampling.BOX)
    fine = grey - np.asarray(coarse.resize((_THUMB, _THUMB), Image.Resampling.BICUBIC))
    return np.rint((fine - fine.mean()) / (fine.std() + 1e-6) * 16).astype(np.int64).ravel()
