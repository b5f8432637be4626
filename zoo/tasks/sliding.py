"""Classes of the pixels of a large image by overlapping windows, in memory of one row of windows.

zoo/export/predictor.py holds the same arithmetic in numpy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.data.tiling import starts
from zoo.errors import UsageError


def check_window(window: tuple[int, int] | None, overlap: int | None) -> int | None:
    """The overlap of windows in pixels; an absent one is a quarter of the shorter side.

    Raises:
        UsageError: no such windows.
    """
    if window is None:
        if overlap is not None:
            raise UsageError(f"window_overlap={overlap}: without a window there is nothing that overlaps; give window")
        return None
    side = min(window)
    if side < 2:
        raise UsageError(f"window={window}: windows have sides of at least 2 pixels")
    overlap = side // 4 if overlap is None else overlap
    if not 0 <= overlap <= side // 2:
        raise UsageError(f"window_overlap={overlap}: windows of {window} pixels share 0 to {side // 2}")
    return overlap


def ramp(length: int, overlap: int) -> Tensor:
    """Weights float32 (length,) of a window's pixels along an axis: min(1, (distance to its end + 0.5) / overlap)."""
    step = torch.arange(length, dtype=torch.float32) + 0.5
    return (torch.minimum(step, length - step) / max(overlap, 1)).clamp(max=1)


def classes_by_windows(
    inference: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    overlap: int,
    batch_size: int = 8,
) -> Tensor:
    """The class of every pixel, int64 (B, H, W): that of the largest weighted mean of the logits of all windows there.

    Windows lie evenly spread and share `overlap` pixels or more, in which the weight of each falls towards its edge: no
    seam shows. Only the logits of one row of windows are held at a time. An image smaller than a window is continued
    by its last pixels.

    Args:
        inference: logits (n, K, *window) of images (n, C, *window).
        images: (B, C, H, W), uint8 or float.
        window: (height, width).
        overlap: pixels that neighbours share at least.
        batch_size: windows at a time.
    """
    (height, width), size = window, images.shape[-2:]
    for axis, least in ((-2, height), (-1, width)):
        if images.shape[axis] < least:
            places = torch.arange(least, device=images.device).clamp(max=images.shape[axis] - 1)
            images = images.index_select(axis, places)
    weights = (ramp(height, overlap)[:, None] * ramp(width, overlap)).to(images.device)
    tops, lefts = starts(images.shape[-2], height, overlap), starts(images.shape[-1], width, overlap)
    found = torch.empty(len(images), *images.shape[-2:], dtype=torch.int64, device=images.device)
    at_once = max(1, batch_size // len(images))
    # Every window that reaches a pixel has its weight in the sum; dividing by their total would change no maximum.
    band: Tensor | None = None
    for top, below in zip(tops, [*tops[1:], tops[-1] + height], strict=True):
        for first in range(0, len(lefts), at_once):
            some = lefts[first : first + at_once]
            parts = [images[..., top : top + height, left : left + width] for left in some]
            logits = inference(torch.cat(parts)).float()
            if band is None:
                band = logits.new_zeros(len(images), logits.shape[1], height, images.shape[-1])
            for left, part in zip(some, logits.split(len(images)), strict=True):
                band[..., left : left + width] += weights * part
        assert band is not None
        done = below - top
        found[:, top:below] = band[:, :, :done].argmax(1)
        band = torch.cat([band[:, :, done:], torch.zeros_like(band[:, :, :done])], dim=2)
    return found[:, : size[0], : size[1]]
