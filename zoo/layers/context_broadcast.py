"""Context Broadcasting: every token moves half way to the mean token."""

import torch
from torch import Tensor, nn

from zoo import kernels


class ContextBroadcast(nn.Module):
    """x_n <- (x_n + s * mean_m x_m) / 2 over tokens x (B, N, C), the class token included.

    Args:
        dim: channels.
        scaled: whether s is learned, one value a channel starting at 1 (CB_S); else s = 1 without parameters (CB).

    Source: Hyeon-Woo et al., arXiv 2210.08457, equation 4; the form and start of CB_S are not certain there.
    """

    def __init__(self, dim: int, scaled: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.context_broadcast(x, self.scale)
