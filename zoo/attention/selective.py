"""Selective self-attention: every token sets how sharp its query and how large its value is.

Source: Zhang et al., "Selective Attention: Enhancing Transformer through Principled Context Control",
arXiv 2411.12892, section 3; the term of the length is that of the authors' release, 1 + exp(-exp(beta)) * log n.
Medium confidence: published for causal text, where n is the position of a token. Here n is the number of its keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import FusedAttention, split_heads
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError


@register_attention(
    "selective",
    paper="Selective Attention: Enhancing Transformer through Principled Context Control, arXiv 2411.12892",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C + 2*N*C",
    confidence="medium",
)
class SelectiveAttention(FusedAttention):
    """softmax(t_q * q k^T / sqrt(d)) (t_v * v): t_q and t_v are inverse temperatures of every token and head.

    t_v = 1 + tanh(gelu(v) w_v); t_q = 1 + tanh(gelu(q) w_q) + exp(-exp(beta)) * log(n / reference_keys), n keys. It
    starts as softmax attention does, up to exp(-exp(2)) = 0.0006 of the last term.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        reference_keys: the number of keys at which the last term is zero; 1, as the authors have it. The tokens of
            training images make it speak of other sizes alone, but leave beta without a gradient at this one.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    crosses_bias = True  # by the number of keys

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        reference_keys: int = 1,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__("selective", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        if reference_keys < 1:
            raise UsageError(f"attention 'selective': reference_keys={reference_keys}; give at least 1")
        self.reference_keys = reference_keys
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        self.q_gate = nn.Parameter(torch.zeros(num_heads, self.head_dim, 1))
        self.v_gate = nn.Parameter(torch.zeros(num_heads, self.head_dim, 1))
        self.beta = nn.Parameter(torch.tensor(2.0))

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t_q * q, k, t_v * v (B, heads, N, d)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, v = split_heads(q, self.num_heads), split_heads(v, self.num_heads)
        wide = torch.promote_types(q.dtype, torch.float32)
        if key_mask is None:
            keys = torch.full((1,), x.shape[1], dtype=wide, device=x.device)
        else:
            keys = key_mask.sum(dim=1).clamp(min=1).to(wide)
        length = (-self.beta.to(wide).exp()).exp() * (keys / self.reference_keys).log()
        sharp = self.temperature(q, self.q_gate) + length[:, None, None, None]
        return (
            (q * sharp).to(q.dtype),
            split_heads(k, self.num_heads),
            (v * self.temperature(v, self.v_gate)).to(v.dtype),
        )

    def temperature(self, features: Tensor, gate: Tensor) -> Tensor:
        """1 + tanh(gelu(features) w): (B, heads, N, 1), float32 or wider."""
        wide = torch.promote_types(features.dtype, torch.float32)
        return 1 + (F.gelu(features) @ gate.to(features.dtype)).to(wide).tanh()
