"""Persistent memory: learned keys and values beside those of the tokens, in one softmax.

Source: Sukhbaatar et al., "Augmenting Self-attention with Persistent Memory", arXiv 1907.01470, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import FusedAttention, masked_softmax, product, split_heads
from zoo.attention.base import Grid, four_axes, logit_bias, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.layers.sdpa import dot_product_attention


@register_attention(
    "persistent_memory",
    paper="Augmenting Self-attention with Persistent Memory, arXiv 1907.01470",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # 32 slots.
    cost="4*N*C**2 + 2*N**2*C + 64*N*C",
)
class PersistentMemoryAttention(FusedAttention):
    """softmax([q k^T, q m^T] / sqrt(d)) [v, u]: `slots` learned keys m and values u a head stand beside the tokens'.

    The paper then drops the network's MLP; here the network around keeps its own. Memory takes slots / (slots + N) of
    the weight at the start, so its share is larger on smaller grids.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        slots: learned keys and values of a head; 0 for none.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    key_mask and bias speak of the tokens alone: memory is always there, and answers alone where no token may.
    """

    undecayed = ("memory_k", "memory_v")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        slots: int = 32,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "persistent_memory", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        if slots < 0:
            raise UsageError(f"attention 'persistent_memory': slots={slots}; give 0 or a positive number")
        self.slots = slots
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        # Stored small and multiplied in use, as the paper does: an optimizer's steps count for more.
        self.memory_k = nn.Parameter(torch.randn(num_heads, slots, self.head_dim) * self.head_dim**-0.5)
        self.memory_v = nn.Parameter(torch.randn(num_heads, slots, self.head_dim) * max(1, slots) ** -0.5)

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, heads, N, d); k and v (B, heads, N + slots, d), those of the tokens first."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shape = (x.shape[0], self.num_heads, self.slots, self.head_dim)
        memory_k = (self.memory_k * self.head_dim**0.5).to(k.dtype).expand(shape)
        memory_v = (self.memory_v * max(1, self.slots) ** 0.5).to(v.dtype).expand(shape)
        k = torch.cat([split_heads(k, self.num_heads), memory_k], dim=2)
        v = torch.cat([split_heads(v, self.num_heads), memory_v], dim=2)
        return split_heads(q, self.num_heads), k, v

    def beside(self, key_mask: Tensor | None, bias: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
        """key_mask and bias of `count` tokens and of memory."""
        if key_mask is not None:
            key_mask = torch.cat([key_mask, key_mask.new_ones(key_mask.shape[0], self.slots)], dim=1)
        if bias is not None:
            bias = F.pad(four_axes(bias).expand(-1, -1, -1, count), (0, self.slots))
        return key_mask, bias

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
        key_mask, bias = self.beside(key_mask, bias, x.shape[1])
        out = dot_product_attention(q, k, v, attn_mask=logit_bias(key_mask, bias, q.dtype), dropout_p=drop)
        return self.finish(zero_without_keys(out, key_mask))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys) of the tokens, float32 or wider; what a row lacks to 1 is memory's."""
        q, k, _ = self.project(x, grid, key_mask)
        key_mask, bias = self.beside(key_mask, bias, x.shape[1])
        weights = masked_softmax(product(q * self.scale, k.transpose(-2, -1)), key_mask, bias)
        return weights[..., : x.shape[1]]
