"""Mixture of block attention: a query attends to the few blocks of keys whose mean fits it best.

Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2.2. The
paper's blocks are pieces of a line, and those after the query's own are hidden; here they are tiles of the grid, and
none is hidden.
"""

import torch
from torch import Tensor

from zoo.attention._choose import first_best
from zoo.attention._pairs import PairAttention, places
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast


@register_attention(
    "moba",
    paper="MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # Where tiles of 4 x 4 divide the grid; the last term is the means of the tiles and their products with queries.
    cost="4*N*C**2 + 2*N**2*C + N**2*C/8",
    forms_map=True,
)
class MobaAttention(PairAttention):
    """Softmax attention of each query, in each head, to its own tile and the best others: q . mean of the tile's keys.

    The choice has no parameters and no gradient; of tiles that fit alike the first ones count. Tiles at the edges may
    be smaller. Prefix tokens see all, are seen by all and belong to no tile. All N x N weights are computed, under a
    mask of every image and head: where there are many tokens this needs more memory than softmax attention.

    Args:
        dim: channels of x.
        block_size: height and width of a tile.
        top_blocks: how many tiles a query sees, its own among them; more than there are is all.

    The other arguments are those of `HeadAttention` and `qkv_bias`. A masked key counts in no mean, and a tile without
    any other key is chosen last.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        block_size: int = 4,
        top_blocks: int = 3,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            *("moba", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj),
            *(grid_size, num_prefix_tokens),
        )
        if block_size < 1 or top_blocks < 1:
            raise UsageError(f"attention 'moba': block_size={block_size}, top_blocks={top_blocks}; both are at least 1")
        self.block_size, self.top_blocks = block_size, top_blocks

    def pairs(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """bool (B, heads, H*W, H*W)."""
        across = (grid[1] + self.block_size - 1) // self.block_size
        blocks = (grid[0] + self.block_size - 1) // self.block_size * across
        y, x = places(grid, q.device)
        tile = y // self.block_size * across + x // self.block_size
        member = tile[:, None] == torch.arange(blocks, device=q.device)[None, :]
        gate = self._gate(q, k, member, key_mask) if torch.jit.is_scripting() else self._precise(q, k, member, key_mask)
        gate = gate.masked_fill(member, float("inf"))
        best = first_best(gate, min(self.top_blocks, blocks))
        chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True)
        return chosen[:, :, :, tile]

    @staticmethod
    def _gate(q: Tensor, k: Tensor, member: Tensor, key_mask: Tensor | None) -> Tensor:
        """float32 or wider (B, heads, H*W, blocks): how well the mean key of every block fits a query."""
        wide = torch.promote_types(q.dtype, torch.float32)
        share = member.to(wide)[None]
        if key_mask is not None:
            share = share * key_mask[:, :, None]
        count = share.sum(dim=1)
        share = share / count.clamp(min=1)[:, None]
        means = share.transpose(1, 2)[:, None] @ k.detach().to(wide)
        gate = q.detach().to(wide) @ means.transpose(-2, -1)
        return gate.masked_fill((count == 0)[:, None, None], float("-inf"))

    @torch.jit.unused
    def _precise(self, q: Tensor, k: Tensor, member: Tensor, key_mask: Tensor | None) -> Tensor:
        # A rounded gate would choose other blocks.
        with without_autocast(q):
            return self._gate(q, k, member, key_mask)
