"""A task for images of any size: shrunk to its own size on the way in, its map brought back on the way out.

Resizing is a product with one small matrix for either axis, so that one graph serves every size and no runtime's own
idea of antialiasing matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnySize(nn.Module):
    """`inference` of an anomaly detection task, for images of any size.

    The score is the one at the model's size, so it stays comparable with the task's threshold.

    Args:
        task: has `inference(images float32 (B, C, h, w) in [0, 1]) -> (score (B,), map (B, 1, h, w))`.
        img_size: (h, w), the size the task works at.
        pad: keep the shape of images, at the top left, and go on with their last pixels; else they are stretched.
    """

    def __init__(self, task: nn.Module, img_size: tuple[int, int], pad: bool = False):
        super().__init__()
        self.task = task.eval()
        self.img_size = img_size
        self.pad = pad

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score float32 (B,) and map float32 (B, 1, H, W) of images uint8 (B, C, H, W), any H and W."""
        sides = [_scalar(side, images.device) for side in images.shape[-2:]]
        inner = self._inner(sides)
        rows, columns = (
            weights(side, length, part, size)
            for side, length, part, size in zip(sides, images.shape[-2:], inner, self.img_size, strict=True)
        )
        score, anomaly_map = self.task.inference(rows @ (images.float() / 255) @ columns.T)
        rows, columns = (
            weights(part, size, side, length)
            for side, length, part, size in zip(sides, images.shape[-2:], inner, self.img_size, strict=True)
        )
        return score.float(), rows @ anomaly_map.float() @ columns.T

    def _inner(self, sides: Sequence[Tensor]) -> list[Tensor]:
        """Height and width that an image takes at the model's size, as `zoo.data` fits it in."""
        whole = [_scalar(side, sides[0].device) for side in self.img_size]
        if not self.pad:
            return whole
        # float64 and this order of operations: Python's own arithmetic there, to the last bit of a rounded half.
        scale = torch.minimum(whole[0] / sides[0], whole[1] / sides[1])
        return [(side * scale).round().minimum(most).clamp(min=1) for side, most in zip(sides, whole, strict=True)]


def weights(given: Tensor, length: int, wanted: Tensor, count: int) -> Tensor:
    """Matrix float32 (count, length) that resizes a line of pixels: each row is one output pixel's weights, sum 1.

    Bilinear, averaging over what one output pixel covers where it shrinks: what Pillow's and torchvision's antialiased
    bilinear filter compute, without rounding in between.

    Args:
        given: float64 (), how many of the `length` pixels are looked at, from the first on.
        length: of the line.
        wanted: float64 (), how many pixels the given ones become.
        count: pixels of the result; those beyond the wanted ones repeat the last.
    """
    step = given / wanted
    number = torch.arange(count, dtype=torch.float64, device=given.device).minimum(wanted - 1)
    places = torch.arange(length, dtype=torch.float64, device=given.device)
    distance = (places + 0.5 - ((number + 0.5) * step)[:, None]).abs()
    found = (1 - distance / step.clamp(min=1)).clamp(min=0) * (places < given)
    return (found / found.sum(1, keepdim=True)).float()


def _scalar(value: int, device: torch.device) -> Tensor:
    # `full`, because the sizes are symbols while the graph is made.
    return torch.full((), value, dtype=torch.float64, device=device)
