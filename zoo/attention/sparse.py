"""Fixed sparse patterns over rows and columns.

Source: Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509, section 4.2 (strided and
fixed attention). The paper's are causal patterns over a line of pixels. Here nothing is hidden for coming later, and
the stride is the row length of the grid at hand: its strided set is then the column of a pixel, its local set the row.
"""

import torch
from torch import Tensor

from zoo.attention._pairs import PairAttention, places
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError, unknown

PAPER = "Generating Long Sequences with Sparse Transformers, arXiv 1904.10509"


@register_attention(
    "sparse_strided",
    paper=PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
)
class SparseStridedAttention(PairAttention):
    """Softmax attention of each cell to its row or column.

    All N x N weights are computed (the pattern itself has H + W keys a query), with one mask for the batch.

    Args:
        dim: channels of x.
        pattern: "heads": the first half of the heads sees rows (the larger half, if their number is odd), the other
            columns, and a single head both; "union": every head sees both under one softmax; "rows" or "columns", for
            networks that alternate them block by block.

    The other arguments are those of `HeadAttention` and `qkv_bias`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        pattern: str = "heads",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            *("sparse_strided", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj),
            *(grid_size, num_prefix_tokens),
        )
        if pattern not in ("heads", "union", "rows", "columns"):
            raise unknown("pattern of attention 'sparse_strided':", pattern, ("heads", "union", "rows", "columns"))
        self.pattern = "union" if pattern == "heads" and num_heads == 1 else pattern

    def pairs(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """bool (1, heads or 1, H*W, H*W): the same row, the same column."""
        y, x = places(grid, q.device)
        rows = (y[:, None] == y[None, :])[None, None]
        columns = (x[:, None] == x[None, :])[None, None]
        if self.pattern == "rows":
            return rows
        if self.pattern == "columns":
            return columns
        if self.pattern == "union":
            return rows | columns
        half = self.num_heads // 2
        return torch.cat([rows.expand(-1, self.num_heads - half, -1, -1), columns.expand(-1, half, -1, -1)], dim=1)


@register_attention(
    "sparse_fixed",
    paper=PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
)
class SparseFixedAttention(PairAttention):
    """Softmax attention of each cell to its row and to summary columns that all see.

    All N x N weights are computed (the pattern itself has W + H * summary_size keys a query), with one mask for the
    batch.

    Args:
        dim: channels of x.
        summary_size: how many columns all see; more than there are is all.
        summary: "edge": the last ones, as in the paper, where these are what comes latest in a row; "spaced": so many
            columns and as many rows, evenly spaced, which suits an encoder that reads both ways (ours).

    The other arguments are those of `HeadAttention` and `qkv_bias`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        summary_size: int = 2,
        summary: str = "edge",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            *("sparse_fixed", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj),
            *(grid_size, num_prefix_tokens),
        )
        if summary not in ("edge", "spaced"):
            raise unknown("summary of attention 'sparse_fixed':", summary, ("edge", "spaced"))
        if summary_size < 1:
            raise UsageError(f"attention 'sparse_fixed': summary_size={summary_size}, it must be at least 1")
        self.summary_size, self.summary = summary_size, summary

    def pairs(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """bool (1, 1, H*W, H*W)."""
        y, x = places(grid, q.device)
        if self.summary == "edge":
            seen = x >= grid[1] - self.summary_size
        else:
            seen = self.spaced(y, grid[0]) | self.spaced(x, grid[1])
        return ((y[:, None] == y[None, :]) | seen[None, :])[None, None]

    def spaced(self, place: Tensor, side: int) -> Tensor:
        """Which places lie in the middle of one of `summary_size` equal parts of a side."""
        count = min(self.summary_size, side)
        middles = (torch.arange(count, device=place.device) * 2 + 1) * side // (2 * count)
        return (place[:, None] == middles[None, :]).any(dim=1)
