"""A depthwise convolution of values over the grid, which several mechanisms add to their answer."""

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UsageError
from zoo.layers.conv2d import depthwise


def depthwise_tokens(
    v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], prefix: int, key_mask: Tensor | None
) -> Tensor:
    """Depthwise convolution of tokens v (B, P + H*W, C) with weight (C, 1, k, k), zeros around the grid.

    Values whose key is masked (key_mask (B or 1, P + H*W)) count as zeros; the answer at prefix tokens is zero.
    """
    if key_mask is not None:
        v = v * key_mask[:, :, None]
    cells = v[:, prefix:].transpose(1, 2).unflatten(2, grid)
    out = depthwise(cells, weight, bias, weight.shape[-1] // 2)
    out = out.flatten(2).transpose(1, 2)
    return F.pad(out, (0, 0, prefix, 0)) if prefix > 0 else out


def check_kernel(name: str, option: str, size: int, smallest: int = 1) -> int:
    """The size of a centred kernel.

    Raises:
        UsageError: it is even, or smaller than allowed.
    """
    if size != smallest and (size < 1 or size % 2 == 0):
        raise UsageError(
            f"attention {name!r}: {option}={size}; a kernel is centred, so give an odd size such as 3 or 5"
        )
    return size
