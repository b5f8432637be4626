"""Grouped-query attention: heads of queries share heads of keys and values; with one of these, multi-query attention.

Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
arXiv 2305.13245, section 2; one head of keys and values: Shazeer, "Fast Transformer Decoding: One Write-Head is All
You Need", arXiv 1911.02150.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.attention._heads import FusedAttention, masked_softmax, product, split_heads
from zoo.attention.base import Grid, four_axes, logit_bias, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.layers.sdpa import dot_product_attention


@register_attention(
    "grouped_query",
    paper="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv 2305.13245",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # 8 heads of queries, 4 of keys and values.
    cost="3*N*C**2 + 2*N**2*C",
)
class GroupedQueryAttention(FusedAttention):
    """softmax(q_a k_r^T / sqrt(d)) v_r for head a of the queries and head r = floor(a * kv_heads / num_heads).

    An encoder saves weights, projections and memory for keys and values; the products over pairs of tokens remain.

    Args:
        dim: channels of x.
        num_heads: heads of queries; divides `dim_out`.
        kv_heads: heads of keys and values; divides `num_heads`. 1 is multi-query attention, `num_heads` is multi-head
            attention. The largest divisor up to num_heads / 2 unless given.
        dim_out: channels of the answer and of q; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        kv_heads: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "grouped_query", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        if kv_heads is None:
            kv_heads = max(n for n in divisors if n <= max(1, num_heads // 2))
        if kv_heads not in divisors:
            raise UsageError(
                f"attention 'grouped_query': kv_heads={kv_heads} does not divide {num_heads} heads of queries; "
                f"valid: {divisors}"
            )
        self.kv_heads = kv_heads
        self.q = nn.Linear(dim, self.dim_out, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=qkv_bias)

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, num_heads, N, d); k and v (B, kv_heads, N, d)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return split_heads(self.q(x), self.num_heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)

    def group_bias(self, key_mask: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the logits of `group_queries`: (B or 1, kv_heads or 1, queries of a group or 1, keys)."""
        if bias is not None:
            bias = four_axes(bias)
            shape = (bias.shape[0], self.num_heads, q.shape[2], bias.shape[3])
            bias = bias.expand(shape).unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        return logit_bias(key_mask, bias, q.dtype)

    def group_queries(self, q: Tensor) -> Tensor:
        """The heads of a group one after another, as queries of one head: (B, kv_heads, heads of a group * N, d).

        So keys and values need not be repeated, in any kernel.
        """
        return q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        q, k, v = self.project(x, grid, key_mask)
        drop = self.attn_drop.p if self.training else 0.0
        added = self.group_bias(key_mask, bias, q)
        out = dot_product_attention(self.group_queries(q), k, v, attn_mask=added, dropout_p=drop)
        out = zero_without_keys(out, key_mask).reshape(q.shape)
        return self.finish(out)

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, num_heads, queries, keys), float32 or wider."""
        q, k, _ = self.project(x, grid, key_mask)
        logits = product(self.group_queries(q) * self.scale, k.transpose(-2, -1))
        return masked_softmax(logits.reshape(q.shape[0], self.num_heads, q.shape[2], k.shape[2]), key_mask, bias)


def group_heads(state: Mapping[str, Tensor], num_heads: int, kv_heads: int) -> dict[str, Tensor]:
    """State of `softmax` attention as one for `grouped_query`: a head of keys or values is the mean of its group.

    Args:
        state: qkv.weight (3 * C, dim) and what else a `softmax` attention of as many channels has.
        num_heads, kv_heads: of the `grouped_query` attention.

    The rest of the state is kept. The answer is the same where the heads of a group were equal; a short training is
    to follow elsewhere.

    Source: arXiv 2305.13245, section 2.1.
    """
    out = {key: value for key, value in state.items() if not key.startswith("qkv.")}
    for part in ("weight", "bias"):
        if f"qkv.{part}" in state:
            q, *both = state[f"qkv.{part}"].chunk(3)
            means = [one.unflatten(0, (kv_heads, num_heads // kv_heads, -1)).mean(dim=1).flatten(0, 1) for one in both]
            out |= {f"q.{part}": q, f"kv.{part}": torch.cat(means)}
    return out
