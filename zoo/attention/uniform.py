"""Uniform attention: every query receives the mean of the values, the baseline that a mechanism has to beat.

Source: Hyeon-Woo et al., "Scratching Visual Transformer's Back with Uniform Attention", arXiv 2210.08457, section 3.
"""

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid
from zoo.attention.registry import register_attention


@register_attention(
    "uniform",
    paper="Scratching Visual Transformer's Back with Uniform Attention, arXiv 2210.08457",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="2*C**2",
)
class UniformAttention(Attention):
    """out_n = proj(mean_m v(x_m)) over tokens.

    The projection to values is linear, so the mean is taken first: the same answer for C*C multiplications an image.

    Args:
        dim: channels of x.
        dim_out: channels of the answer; `dim` unless given.
        qkv_bias: a bias in the projection to values.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.v = nn.Linear(dim, self.dim_out, bias=qkv_bias)
        self.proj = nn.Linear(self.dim_out, self.dim_out) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out), equal in every token; see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'uniform' has no logits, so it takes no bias; use 'softmax' for that")
        wide = torch.promote_types(x.dtype, torch.float32)
        if key_mask is None:
            values = self.v(x.mean(dim=1, keepdim=True, dtype=wide).to(x.dtype))
        else:
            count = key_mask.sum(dim=1)[:, None, None]
            total = (x * key_mask[:, :, None]).sum(dim=1, keepdim=True, dtype=wide)
            values = self.v((total / count.clamp(min=1)).to(x.dtype)).masked_fill(count == 0, 0.0)
        return self.proj_drop(self.proj(values).expand(-1, x.shape[1], -1))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, 1, tokens, tokens): 1 / (number of keys that may be attended)."""
        batch, count, _ = x.shape
        if key_mask is None:
            key_mask = torch.ones(1, count, dtype=torch.bool, device=x.device)
        weights = key_mask.float() / key_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return weights[:, None, None, :].expand(batch, 1, count, count)
