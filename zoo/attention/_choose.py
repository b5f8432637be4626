"""The choice of a few tokens or blocks by a score."""

import torch
from torch import Tensor

# How many steps a score has between 0 and 1, and where it ends: their product with 2^22 places stays an int64.
_STEPS = 2**10
_END = 2.0**30


def first_best(score: Tensor, count: int, steps: int = _STEPS, end: float = _END) -> Tensor:
    """Indices (..., count) of the largest scores (..., N), the first ones among scores that agree to 1/1024.

    In a flat image, or beside a border of zeros, tokens are equal and their scores equal up to rounding. Without this
    rule every machine, and an exported network, would choose others of them. Infinite scores are first and last.
    """
    rank = (score.detach().clamp(-end, end) * steps).round().long() * score.shape[-1]
    return (rank - torch.arange(score.shape[-1], device=score.device)).topk(count, dim=-1).indices
