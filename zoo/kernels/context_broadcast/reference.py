"""The definition of the op in plain torch."""

import torch
from torch import Tensor


def context_broadcast(x: Tensor, scale: Tensor | None) -> Tensor:
    """(x + scale * mean_n(x)) / 2 in float32 (float64 stays), in the dtype of x (B, N, C); scale (C,) or None."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dim=1, keepdim=True)
    if scale is not None:
        mean = mean * scale
    return ((wide + mean) / 2).to(x.dtype)
