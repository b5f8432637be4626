"""Threshold relative attention: keys below a threshold are gone, and distance counts only the keys that are left.

Source: Opper et al., "TRA: Better Length Generalisation with Threshold Relative Attention", arXiv 2503.23174. The
paper's order is that of a line, with what comes later hidden. Here keys are ordered by their distance on the grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import HeadAttention, check_map, split_heads
from zoo.attention._pairs import pair_bias, places
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import unknown
from zoo.kernels.precision import without_autocast


@register_attention(
    "threshold_relative",
    paper="TRA: Better Length Generalisation with Threshold Relative Attention, arXiv 2503.23174",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C + 8*N*C",
    forms_map=True,
    confidence="medium",
)
class ThresholdRelativeAttention(HeadAttention):
    """Weights of query i: softmax of S_ij + delta_i * n_ij over the keys j with S_ij > 0.

    S = relu(q k^T / sqrt(d)) of q and k divided by their root mean square; delta_i = log sigmoid(w x_i + b) <= 0 for
    each head; n_ij counts the keys t with S_it > 0 that are no further from i than j is, j among them. A query without
    any such key answers 0. Prefix tokens lie at no distance: n is 0 for their keys and queries, and they are not
    counted. Several maps of N x N float32 weights of every image and head lie in memory.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        distance: "chebyshev" (square rings) or "euclidean" (round ones); keys of one ring are equally far.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop: dropout of the logits, as the authors do it.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    A masked key counts as one below the threshold.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        distance: str = "chebyshev",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            *("threshold_relative", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        )
        if distance not in ("chebyshev", "euclidean"):
            raise unknown("distance of attention 'threshold_relative':", distance, ("chebyshev", "euclidean"))
        self.distance = distance
        self.eps = 1e-6
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        self.decay = nn.Linear(dim, num_heads)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'threshold_relative' thresholds its logits, so it takes no bias; use 'softmax'")
        weights, v = self.weigh(x, grid, key_mask)
        return self.finish(weights.to(v.dtype) @ v)

    def attention_map(self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None) -> Tensor:
        """float32 weights (B, heads, queries, keys); the row of a query with nothing above the threshold is 0."""
        return self.weigh(x, grid, key_mask)[0].float()

    def weigh(self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (B, heads, tokens, tokens), float32 or wider, and v (B, heads, tokens, head_dim)."""
        check_map(self.name, x.shape[0], self.num_heads, x.shape[1], x.shape[1])
        grid = self.token_grid(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        q = self.unit(split_heads(q, self.num_heads).to(wide))
        k = self.unit(split_heads(k, self.num_heads).to(wide))
        logits = self._product(q, k) if torch.jit.is_scripting() else self._precise(q, k)
        kept = logits > 0
        if key_mask is not None:
            kept = kept & key_mask[:, None, None, :]
        delta = F.logsigmoid(self.decay(x).to(wide)).transpose(1, 2)[..., None]
        logits = logits.relu() + delta * self.nearer(kept, grid).to(wide)
        # Further down than any decay times any count.
        weights = (self.attn_drop(logits) + pair_bias(kept, None, wide, masked=-1e30)).softmax(dim=-1)
        return weights.masked_fill(~kept.any(dim=-1, keepdim=True), 0.0), split_heads(v, self.num_heads)

    def unit(self, x: Tensor) -> Tensor:
        """x over the root mean square of its last dimension."""
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)

    @torch.jit.unused
    def _precise(self, q: Tensor, k: Tensor) -> Tensor:
        # Rounded products would fall on other sides of the threshold.
        with without_autocast(q):
            return self._product(q, k)

    def nearer(self, kept: Tensor, grid: tuple[int, int]) -> Tensor:
        """n (B, heads, tokens, tokens): how many kept keys are no further from the query than the key is."""
        prefix = self.num_prefix_tokens
        ring = self.rings(grid, kept.device)
        inner = kept[:, :, prefix:, prefix:].float()
        # Rings count from 0 to that of the far corner.
        last = max(grid[0], grid[1]) - 1
        if self.distance == "euclidean":
            last = (grid[0] - 1) * (grid[0] - 1) + (grid[1] - 1) * (grid[1] - 1)
        place = ring[None, None].expand(kept.shape[0], kept.shape[1], -1, -1)
        count = torch.zeros(kept.shape[0], kept.shape[1], ring.shape[0], last + 1, device=kept.device)
        count = count.scatter_add(-1, place, inner).cumsum(dim=-1).gather(-1, place)
        return F.pad(count, (prefix, 0, prefix, 0)) if prefix > 0 else count

    def rings(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(H*W, H*W): a whole number that grows with the distance of two cells."""
        y, x = places(grid, device)
        down, right = y[:, None] - y[None, :], x[:, None] - x[None, :]
        if self.distance == "euclidean":
            return down * down + right * right
        return torch.maximum(down.abs(), right.abs())
