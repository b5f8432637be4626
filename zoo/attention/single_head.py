"""Single-head attention over a part of the channels.

Source: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456,
section 3.2 (equations 1 to 3); the place of the ReLU and the statistics of the norm are those of the authors' release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import check_map
from zoo.attention.base import Attention, Grid, logit_bias, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.layers.conv_norm import ConvNorm


@register_attention(
    "single_head",
    paper="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, arXiv 2401.16456",
    supports=("key_mask", "bias"),
    prefix="pass",
    # A part of round(C / 4.67) channels attends, with queries and keys of 16.
    cost="N*C**2 + N*round(C/4.67)*(32 + round(C/4.67)) + N**2*(16 + round(C/4.67))",
    forms_map=True,
)
class SingleHeadAttention(Attention):
    """proj(relu([softmax(q k^T / sqrt(qk_dim)) v, x2])) with q, k, v of norm(x1); maps (B, dim, H, W) -> same shape.

    x1 are the first `partial_dim` channels, x2 the others, which go round the norm too. The norm takes its mean and
    variance over all channels and places of an image. BatchNorm follows both projections.

    Args:
        dim: channels of x.
        partial_dim: channels that attend; dim / 4.67, the paper's part, unless given.
        qk_dim: channels of queries and keys.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Forms a map of N x N, bounded by `check_map`. A masked key counts neither as a key nor for the norm, but in training
    it does for the statistics of BatchNorm.
    """

    layout = "map"
    crosses_bias = True  # by its norm

    def __init__(
        self,
        dim: int,
        *,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, None, grid_size, num_prefix_tokens)
        self.partial_dim = max(1, round(dim / 4.67)) if partial_dim is None else partial_dim
        if not 1 <= self.partial_dim <= dim:
            raise UsageError(f"attention 'single_head': partial_dim={partial_dim}; valid: 1 to {dim}, the channels")
        if qk_dim < 1:
            raise UsageError(f"attention 'single_head': qk_dim={qk_dim}, it must be at least 1")
        self.qk_dim = qk_dim
        self.scale = qk_dim**-0.5
        self.norm = nn.GroupNorm(1, self.partial_dim)
        self.qkv = ConvNorm(self.partial_dim, 2 * qk_dim + self.partial_dim)
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, dim, H, W) -> the same shape; see `Attention` for the rest."""
        weights, v = self.attend(x, key_mask, bias)
        out = (weights.to(v.dtype) @ v).transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))
        return self.proj(self.act(torch.cat([out, x[:, self.partial_dim :].to(out.dtype)], dim=1)))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, 1, queries, keys)."""
        return self.attend(x, key_mask, bias)[0][:, None]

    def attend(self, x: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """float32 weights (B, H*W, H*W), and values (B, H*W, partial_dim)."""
        count = x.shape[2] * x.shape[3]
        check_map("single_head", x.shape[0], 1, count, count)
        cells = self.normalise(x[:, : self.partial_dim].permute(0, 2, 3, 1), key_mask)
        # A channels-last map, as the network around may be: tokens are views of what comes out.
        qkv = self.qkv(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = qkv.split([self.qk_dim, self.qk_dim, self.partial_dim], dim=2)
        logits = (q * self.scale) @ k.transpose(1, 2)
        added = logit_bias(key_mask, bias, torch.float32)
        if added is not None:
            logits = logits + added.squeeze(1)
        weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return zero_without_keys(weights[:, None], key_mask).squeeze(1), v

    def normalise(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """The norm of cells x (B, H, W, partial_dim), dense in this order, which torch's GroupNorm would turn round."""
        shape = [x.shape[1], x.shape[2], x.shape[3]]
        if key_mask is None:
            out = F.layer_norm(x, shape, eps=self.norm.eps)
        else:
            seen = key_mask.reshape(-1, shape[0], shape[1], 1)
            wide = torch.promote_types(x.dtype, torch.float32)
            count = (seen.sum(dim=(1, 2, 3), keepdim=True) * shape[2]).clamp(min=1)
            centred = x.to(wide) * seen
            centred = (x.to(wide) - centred.sum(dim=(1, 2, 3), keepdim=True) / count) * seen
            variance = centred.square().sum(dim=(1, 2, 3), keepdim=True) / count
            out = (centred * (variance + self.norm.eps).rsqrt()).to(x.dtype)
        return out * self.norm.weight + self.norm.bias
