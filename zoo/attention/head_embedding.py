"""Multiple-head-embedding attention: heads share one projection and differ by an embedding.

Source: Xue and Aletras, "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head
Attention", arXiv 2310.07911, section 3. Medium confidence: the 1 of the multiplicative form and the start of the
embeddings are taken from secondary descriptions, and the paper trains on text alone.
"""

import torch
from torch import Tensor, nn

from zoo.attention._heads import FusedAttention
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import unknown


@register_attention(
    "head_embedding",
    paper="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention, "
    "arXiv 2310.07911",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # 8 heads.
    cost="3*N*C**2/8 + N*C**2 + 2*N**2*C",
    confidence="medium",
)
class HeadEmbeddingAttention(FusedAttention):
    """softmax(q_a k_a^T / sqrt(d)) v_a with q_a = q * (1 + E^q_a), likewise k_a and v_a; q, k, v are of one head.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        combine: "mul", as above, or "add", q_a = q + E^q_a. A vector added to all keys changes no softmax, so "add"
            has no embedding of keys.
        dim_out: channels of the answer; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Raises:
        UsageError: `combine` is neither.
    """

    undecayed = ("q_embed", "k_embed", "v_embed")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        combine: str = "mul",
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "head_embedding", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        if combine not in ("mul", "add"):
            raise unknown("combine of attention 'head_embedding':", combine, ("mul", "add"))
        self.adds = combine == "add"
        self.qkv = nn.Linear(dim, 3 * self.head_dim, bias=qkv_bias)
        # Small, as tables of positions start.
        self.q_embed = nn.Parameter(0.02 * torch.randn(num_heads, 1, self.head_dim))
        self.k_embed = None if self.adds else nn.Parameter(0.02 * torch.randn(num_heads, 1, self.head_dim))
        self.v_embed = nn.Parameter(0.02 * torch.randn(num_heads, 1, self.head_dim))

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d)."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.embed(q, self.q_embed), self.embed(k, self.k_embed), self.embed(v, self.v_embed)

    def embed(self, one: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, 1, N, d), the same for all heads, as (B, heads, N, d)."""
        if embedding is None:
            return one.expand(-1, self.num_heads, -1, -1)
        embedding = embedding.to(one.dtype)
        return one + embedding if self.adds else one * (1 + embedding)
