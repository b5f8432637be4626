"""Efficient attention: queries and keys normalised apart, so that keys meet values first, at a cost linear in tokens.

Source: Shen et al., "Efficient Attention: Attention with Linear Complexities", arXiv 1812.01243, section 3.2. The
module of the authors adds its input to the answer; here that is left to the network around.
"""

import torch
from torch import Tensor, nn

from zoo.attention._heads import join_heads, product, split_heads
from zoo.attention.base import MASKED, Attention, Grid, check_heads
from zoo.attention.registry import register_attention
from zoo.errors import UsageError, unknown


@register_attention(
    "efficient",
    paper="Efficient Attention: Attention with Linear Complexities, arXiv 1812.01243",
    supports=("key_mask", "prefix"),
    prefix="mix",
    # 8 heads.
    cost="4*N*C**2 + 2*N*C**2/8",
)
class EfficientAttention(Attention):
    """softmax_channels(q) (softmax_tokens(k)^T v): queries over the channels of a head, keys over all tokens.

    The product in brackets is summed first, one matrix of d_k x d_v a head.

    Args:
        dim: channels of x.
        num_heads: heads; divides the channels of queries, keys and values.
        normalisation: "softmax", as above, or "scaling", (q / sqrt(N)) ((k / sqrt(N))^T v) for N keys.
        key_dim: channels of all keys, and of queries; `dim` unless given.
        value_dim: channels of values; `dim_out` unless given.
        dim_out: channels of the answer; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows; without it the values are the answer, so `value_dim` is `dim_out`.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Raises:
        UsageError: the heads do not divide the channels, or an option is none of these.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        normalisation: str = "softmax",
        key_dim: int | None = None,
        value_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        if normalisation not in ("softmax", "scaling"):
            raise unknown("normalisation of attention 'efficient':", normalisation, ("softmax", "scaling"))
        self.scales = normalisation == "scaling"
        self.num_heads = num_heads
        self.key_dim = dim if key_dim is None else key_dim
        self.value_dim = self.dim_out if value_dim is None else value_dim
        check_heads("efficient", self.key_dim, num_heads)
        check_heads("efficient", self.value_dim, num_heads)
        if not proj and self.value_dim != self.dim_out:
            raise UsageError(
                f"attention 'efficient': without proj the answer has the channels of the values, {self.value_dim}, but "
                f"{self.dim_out} are wanted; leave out value_dim"
            )
        self.qkv = nn.Linear(dim, 2 * self.key_dim + self.value_dim, bias=qkv_bias)
        self.proj = nn.Linear(self.value_dim, self.dim_out) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'efficient' has no logits, so it takes no bias; use 'softmax' for that")
        q, k, v = self.project(x, key_mask)
        out = product(q, product(k.transpose(-2, -1), v)).to(v.dtype)
        return self.proj_drop(self.proj(join_heads(out)))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys) that forward implies, float32 or wider; with "scaling" of any sign."""
        q, k, _ = self.project(x, key_mask)
        return product(q, k.transpose(-2, -1))

    def project(self, x: Tensor, key_mask: Tensor | None, masked: float = MASKED) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q and k (B, heads, N, d_k), float32 or wider, and v (B, heads, N, d_v)."""
        q, k, v = self.qkv(x).split([self.key_dim, self.key_dim, self.value_dim], dim=2)
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k = split_heads(q, self.num_heads).to(wide), split_heads(k, self.num_heads).to(wide)
        v = split_heads(v, self.num_heads)
        if key_mask is None:
            if self.scales:
                return q * x.shape[1] ** -0.5, k * x.shape[1] ** -0.5, v
            return q.softmax(dim=-1), k.softmax(dim=2), v
        seen = key_mask[:, None, :, None]
        if self.scales:
            count = seen.sum(dim=2, keepdim=True).clamp(min=1).to(wide)
            return q * count.rsqrt(), k * count.rsqrt() * seen, v
        # Times seen: where nothing may be attended, the softmax of equal numbers is not zero.
        return q.softmax(dim=-1), k.masked_fill(~seen, masked).softmax(dim=2) * seen, v
