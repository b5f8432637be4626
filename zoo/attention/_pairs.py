"""Softmax attention in which each query sees some keys only: what patterns over the grid share.

All weights are computed and those of unseen pairs are exactly 0, so the cost is that of softmax attention, and a mask
of all pairs of tokens lies in memory besides: one for the whole batch where the pattern looks at the places alone.
`check_map` bounds it as if every image had its own, because not every kernel of torch shares it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import HeadAttention, check_map, split_heads
from zoo.attention.base import MASKED, Grid, four_axes
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention


def places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column (H*W,) of every cell of a grid, row by row."""
    rows = torch.arange(grid[0], device=device)[:, None].expand(grid[0], grid[1]).reshape(-1)
    columns = torch.arange(grid[1], device=device)[None, :].expand(grid[0], grid[1]).reshape(-1)
    return rows, columns


def pair_bias(allowed: Tensor, bias: Tensor | None, dtype: torch.dtype, masked: float = MASKED) -> Tensor:
    """What to add to the logits of pairs `allowed` (broadcastable to (B, heads, queries, keys)) and of others."""
    if bias is None:
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, masked)
    return four_axes(bias).to(dtype).masked_fill(~allowed, masked)


class PairAttention(HeadAttention):
    """Multi-head softmax attention to the keys that `pairs` allows; prefix tokens see all and are seen by all.

    Args:
        qkv_bias: biases in the projections to q, k and v.

    The other arguments are those of `HeadAttention`.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        num_heads: int,
        dim_out: int | None,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        proj: bool,
        grid_size: Grid,
        num_prefix_tokens: int,
    ):
        super().__init__(name, dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)

    def pairs(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """Which cells see which: bool (B or 1, heads or 1, H*W, H*W).

        q, k (B, heads, H*W, head_dim) and key_mask (B or 1, H*W) are those of the grid, without prefix tokens.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        q, k, v = self.project(x)
        allowed = self.allowed(q, k, self.token_grid(x, grid), key_mask)
        drop = self.attn_drop.p if self.training else 0.0
        out = dot_product_attention(q, k, v, attn_mask=pair_bias(allowed, bias, q.dtype), dropout_p=drop)
        if key_mask is not None:
            out = out.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        return self.finish(out)

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, heads, queries, keys)."""
        q, k, _ = self.project(x)
        allowed = self.allowed(q, k, self.token_grid(x, grid), key_mask)
        with without_autocast(x):
            logits = (q.float() * self.scale) @ k.float().transpose(-2, -1)
        weights = (logits + pair_bias(allowed, bias, torch.float32)).softmax(dim=-1)
        return weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, tokens, head_dim)."""
        check_map(self.name, x.shape[0], self.num_heads, x.shape[1], x.shape[1])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def allowed(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """Which tokens see which: bool (B or 1, heads or 1, P + H*W, P + H*W)."""
        prefix = self.num_prefix_tokens
        inner = key_mask
        if inner is not None:
            inner = inner[:, prefix:]
        seen = self.pairs(q[:, :, prefix:], k[:, :, prefix:], grid, inner)
        if prefix > 0:
            seen = F.pad(seen, (prefix, 0, prefix, 0), value=1.0)
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        return seen
