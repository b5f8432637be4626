"""Rectified linear attention: ReLU in the place of softmax, a norm in the place of its sum.

Source: Zhang, Titov and Sennrich, "Sparse Attention with Linear Units", arXiv 2104.07012, sections 3.1 and 3.2. The
start of the gains of `rela` (medium confidence) is theirs; the gate of `rela_gated` starts at a half, where theirs is
random.
"""

import torch
from torch import Tensor, nn

from zoo.attention._heads import MapAttention, join_heads, product
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention

_PAPER = "Sparse Attention with Linear Units, arXiv 2104.07012"


class _Rectified(MapAttention):
    """What both share: relu(q k^T / sqrt(d)) v, and RMSNorm over the channels of all heads together."""

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
        super().__init__(
            name, dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        # Keeps the factor of a token that no key answers finite.
        self.eps = 1e-6
        self.gain = nn.Parameter(torch.ones(self.dim_out))

    def weigh(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Weights (B, heads, N, N), none below zero, of any sum."""
        logits = product(q * self.scale, k.transpose(-2, -1))
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide)
        weights = (logits if bias is None else logits + bias.to(wide)).relu()
        return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None, :], 0.0)

    def normalise(self, z: Tensor) -> Tensor:
        """RMSNorm of z (B, N, C), float32 or wider."""
        return z * (z.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.gain

    def gather(self, weights: Tensor, v: Tensor) -> Tensor:
        """The weighted sums z (B, N, C), float32 or wider."""
        return join_heads(product(self.attn_drop(weights), v)).to(weights.dtype)


@register_attention(
    "rela",
    paper=_PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
)
class RectifiedAttention(_Rectified):
    """RMSNorm(relu(q k^T / sqrt(d)) v), all heads in one norm; a query may find no key at all and is answered zero.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Forms a map of N x N, bounded by `check_map`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "rela", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        # Xavier's uniform numbers for as many inputs as outputs.
        reach = (3 / self.dim_out) ** 0.5
        nn.init.uniform_(self.gain, -reach, reach)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        weights, v = self.attend(x, grid, key_mask, bias)
        z = self.gather(weights, v)
        return self.proj_drop(self.proj(self.normalise(z).to(v.dtype)))


@register_attention(
    "rela_gated",
    paper=_PAPER,
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
)
class GatedRectifiedAttention(_Rectified):
    """sigmoid(w * z) * RMSNorm(z) with z = relu(q k^T / sqrt(d)) v: a gate for every channel that sees z as it is.

    The arguments are those of `RectifiedAttention`. Forms a map of N x N, bounded by `check_map`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "rela_gated", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        self.gate = nn.Parameter(torch.zeros(self.dim_out))

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        weights, v = self.attend(x, grid, key_mask, bias)
        z = self.gather(weights, v)
        out = (self.gate * z).sigmoid() * self.normalise(z)
        return self.proj_drop(self.proj(out.to(v.dtype)))
