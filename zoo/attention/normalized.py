"""Normalized attention pooling: logits standardised over the keys of a query, in the place of softmax.

Source: Richter and Wattenhofer, "Normalized Attention Without Probability Cage", arXiv 2005.09561, section 3. The norms
that the paper's block has besides belong to the network around.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import MapAttention, join_heads, product
from zoo.attention.base import MASKED, Grid
from zoo.attention.registry import register_attention


@register_attention(
    "normalized",
    paper="Normalized Attention Without Probability Cage, arXiv 2005.09561",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
)
class NormalizedAttention(MapAttention):
    """gelu(LayerNorm(o)) with o = (gamma * (l - mean l) / (std l + 1e-3) + beta) v and l = q k^T.

    Mean and standard deviation are those of a row. Weights are below zero for about half of the keys, and sum to
    N * beta. A masked key counts neither for the mean nor for the standard deviation. A bias of far below zero, which
    hides keys, would spoil both: there is none.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`. gamma and beta are numbers a head.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        gelu: whether GELU follows the norm over the channels of all heads.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Forms a map of N x N, bounded by `check_map`. Dropout of weights would move their mean: there is none.
    """

    undecayed = ("gamma", "beta")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        gelu: bool = True,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "normalized", dim, num_heads, dim_out, qkv_bias, 0.0, proj_drop, proj, grid_size, num_prefix_tokens
        )
        # The paper's: bounds the gain where all keys are alike.
        self.eps = 1e-3
        self.gamma = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.beta = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.norm = nn.LayerNorm(self.dim_out)
        self.gelu = gelu

    def weigh(
        self,
        q: Tensor,
        k: Tensor,
        grid: tuple[int, int] | None,
        key_mask: Tensor | None,
        bias: Tensor | None,
        masked: float = MASKED,
    ) -> Tensor:
        """Weights (B, heads, N, N) of any sign, zero for masked keys."""
        if bias is not None:
            raise ValueError("attention 'normalized' takes no bias, which would move means; use 'softmax' for that")
        logits = product(q, k.transpose(-2, -1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # From the largest, whose place does not matter: equal logits become zeros, and their mean is exactly that.
        if key_mask is None:
            logits = logits - logits.detach().amax(dim=-1, keepdim=True)
            centred = logits - logits.mean(dim=-1, keepdim=True)
            variance = centred.square().mean(dim=-1, keepdim=True)
            return self.gamma * self.standardise(centred, variance) + self.beta
        seen = key_mask[:, None, None, :].to(logits.dtype)
        top = logits.detach().masked_fill(~key_mask[:, None, None, :], masked).amax(dim=-1, keepdim=True)
        logits = (logits - top) * seen
        count = seen.sum(dim=-1, keepdim=True).clamp(min=1)
        centred = (logits - logits.sum(dim=-1, keepdim=True) / count) * seen
        variance = centred.square().sum(dim=-1, keepdim=True) / count
        return (self.gamma * self.standardise(centred, variance) + self.beta) * seen

    def standardise(self, centred: Tensor, variance: Tensor) -> Tensor:
        # The slope of the root at zero is infinite; the sum does not see what is cut off.
        return centred / (variance.clamp(min=1e-12).sqrt() + self.eps)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        weights, v = self.attend(x, grid, key_mask, bias)
        out = join_heads(product(weights, v))
        # Sums of N weights of any sign: they enter the norm as wide as they come.
        wide = torch.promote_types(out.dtype, torch.float32)
        gain, offset = self.norm.weight.to(wide), self.norm.bias.to(wide)
        out = F.layer_norm(out.to(wide), [self.dim_out], gain, offset, self.norm.eps).to(self.norm.weight.dtype)
        if key_mask is not None:
            # The norm's bias is no answer.
            out = out.masked_fill(~key_mask.any(dim=1)[:, None, None], 0.0)
        if self.gelu:
            out = F.gelu(out)
        return self.proj_drop(self.proj(out))
