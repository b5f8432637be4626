"""The choice of a few tokens or blocks by a score."""

import torch
from torch import Tensor


def first_best(score: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores (..., N), the first ones among scores that are equal up to rounding.

    Float32 scores that agree to 2^-16 may count as equal, float64 ones to 2^-28. In a flat image, or beside a border of
    zeros, tokens are equal and their scores equal up to rounding: without this rule every machine, and an exported
    network, would choose others of them. A coarser one would turn round scores that do differ: among 200 tokens
    neighbours are about 2^-7 apart. Infinite scores are first and last.
    """
    # Steps times end times 2^22 places stays an int64.
    steps, end = (2.0**28, 2.0**12) if score.dtype == torch.float64 else (2.0**16, 2.0**24)
    rank = (score.detach().clamp(-end, end) * steps).round().long() * score.shape[-1]
    return (rank - torch.arange(score.shape[-1], device=score.device)).topk(count, dim=-1).indices
