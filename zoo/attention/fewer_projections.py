"""Attention with fewer projections: "optimised", "efficient" and "super" attention.

Source: Hosseini and Hosseini, "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism",
arXiv 2403.01643. The efficient attention of arXiv 1812.01243, of linear cost, is `efficient`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import FusedAttention, split_heads
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention

_PAPER = "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism, arXiv 2403.01643"


class _FewerProjections(FusedAttention):
    """What the three share: the values of a head are a slice of the channels of x, so the answer has as many."""

    def __init__(
        self,
        name: str,
        dim: int,
        projections: int,
        num_heads: int,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        proj: bool,
        grid_size: Grid,
        num_prefix_tokens: int,
    ):
        super().__init__(name, dim, num_heads, None, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        self.qk = nn.Linear(dim, projections * dim, bias=qkv_bias)


@register_attention(
    "optimised",
    paper=_PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="3*N*C**2 + 2*N**2*C",
)
class OptimisedAttention(_FewerProjections):
    """softmax(q_a k_a^T / sqrt(d)) x_a, x_a the channels of head a of the input itself: no projection to values.

    Args:
        dim: channels of x, and of the answer.
        num_heads: heads; divides `dim`.
        qkv_bias: biases in the projections to q and k.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "optimised", dim, 2, num_heads, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d)."""
        q, k = self.qk(x).chunk(2, dim=-1)
        return (
            split_heads(q, self.num_heads),
            split_heads(k, self.num_heads),
            split_heads(x.to(q.dtype), self.num_heads),
        )


@register_attention(
    "efficient_params",
    paper=_PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="2*N*C**2 + 2*N**2*C",
)
class EfficientParamsAttention(_FewerProjections):
    """softmax(q_a x_a^T / sqrt(d)) x_a, x_a the channels of head a of the input itself: a projection to queries alone.

    The arguments are those of `OptimisedAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "efficient_params", dim, 1, num_heads, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d)."""
        q = self.qk(x)
        same = split_heads(x.to(q.dtype), self.num_heads)
        return split_heads(q, self.num_heads), same, same


@register_attention(
    "super",
    paper=_PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="2*N*C**2 + 3*N**2*C",
    fixed_grid=True,
    # Published for one number of tokens; other grids, and the start, are ours.
    confidence="medium",
)
class SuperAttention(_FewerProjections):
    """softmax(q_a x_a^T / sqrt(d)) (W x)_a: as `efficient_params`, with values mixed over tokens by a learned W.

    W = 1 + mix is N x N, made for `grid_size`, and 1 at the start. On another grid mix is resized: as a function of
    two places, bilinearly along the sides of both; columns of places times old / new number of places, so that a row
    gathers as much. The paper knows one number of tokens alone, and starts W at random. A masked key is zero
    for W too.

    Args:
        grid_size: the grid that W is made for: (P + H*W)^2 parameters.

    The other arguments are those of `OptimisedAttention`.
    """

    crosses_bias = True  # by W

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__("super", dim, 1, num_heads, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        count = num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.mix = nn.Parameter(torch.zeros(count, count))

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d)."""
        q = self.qk(x)
        x = x.to(q.dtype)
        seen = x if key_mask is None else x * key_mask[:, :, None]
        mix = self.resized(self.token_grid(x, grid)).to(q.dtype)
        v = split_heads(seen + mix @ seen, self.num_heads)
        return split_heads(q, self.num_heads), split_heads(x, self.num_heads), v

    def resized(self, grid: tuple[int, int]) -> Tensor:
        """mix for a grid (H, W): (P + H*W, P + H*W)."""
        if grid == self.grid_size:
            return self.mix
        old, new = self.grid_size[0] * self.grid_size[1], grid[0] * grid[1]
        sides = self._resize_columns(self.mix, grid)
        mix = self._resize_columns(sides.transpose(0, 1), grid).transpose(0, 1)
        prefix = self.num_prefix_tokens
        return torch.cat([mix[:, :prefix], mix[:, prefix:] * (old / new)], dim=1)

    def _resize_columns(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """(rows, P + h*w) of the own grid as (rows, P + H*W)."""
        prefix = self.num_prefix_tokens
        places = table[:, prefix:].unflatten(1, self.grid_size).unsqueeze(1)
        wide = torch.promote_types(places.dtype, torch.float32)
        places = F.interpolate(places.to(wide), size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:, :prefix], places.flatten(1).to(table.dtype)], dim=1)
