"""Local relation aggregation: affinities of the neighbours that are learned per channel and ask nothing of the image.

Source: Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", arXiv 2201.09450,
section 3.2 (equations 4 to 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid
from zoo.attention.depthwise import check_kernel
from zoo.attention.registry import register_attention
from zoo.layers.conv2d import Conv2d


@register_attention(
    "local_relation",
    paper="UniFormer: Unifying Convolution and Self-attention for Visual Recognition, arXiv 2201.09450",
    supports=("key_mask",),
    prefix="pass",
    cost="2*N*C**2 + 25*N*C",
)
class LocalRelationAttention(Attention):
    """out = proj(sum_m a_(m-n) v(x_m)) over the k x k neighbours m of n; maps (B, dim, H, W) -> (B, dim_out, H, W).

    Every channel is a head with its own affinities a, a depthwise convolution; beyond the grid v counts as zero.

    Args:
        dim: channels of x.
        dim_out: channels of the answer and of v; `dim` unless given.
        kernel_size: side k of the neighbourhood, odd.
        qkv_bias: a bias in the projection to values.
        proj_drop: dropout of the answer.
        proj: whether a projection follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    layout = "map"

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        width, kernel = self.dim_out, check_kernel("local_relation", "kernel_size", kernel_size)
        self.v = nn.Conv2d(dim, width, 1, bias=qkv_bias)
        self.affinity = Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.proj = nn.Conv2d(width, width, 1) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, dim, H, W) -> (B, dim_out, H, W); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'local_relation' has no logits, so it takes no bias; use 'softmax' for that")
        v = self.v(x)
        if key_mask is None:
            out = self.affinity(v)
        else:
            out = self.affinity(v * key_mask.unflatten(1, (x.shape[2], x.shape[3]))[:, None])
            out = out.masked_fill(~key_mask.any(dim=1)[:, None, None, None], 0.0)
        return self.proj_drop(self.proj(out))

    def attention_map(self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None) -> Tensor:
        """float32 affinities (B, dim_out, queries, keys): signed, of any sum; `affinity.bias` comes on top."""
        height, width = x.shape[2], x.shape[3]
        kernel, reach = self.affinity.weight[:, 0].float(), self.affinity.weight.shape[-1] // 2
        down, right = (self._offsets(side, x.device) for side in (height, width))
        # Row by row of the padded table, so that every offset beyond the kernel falls on a zero.
        table = F.pad(kernel, (1, 1, 1, 1))
        rows = (down.clamp(-reach - 1, reach + 1) + reach + 1)[:, None, :, None]
        columns = (right.clamp(-reach - 1, reach + 1) + reach + 1)[None, :, None, :]
        weights = table[:, rows, columns].flatten(3, 4).flatten(1, 2)
        weights = weights.expand(x.shape[0], -1, -1, -1)
        return weights if key_mask is None else weights * key_mask[:, None, None]

    @staticmethod
    def _offsets(side: int, device: torch.device) -> Tensor:
        """(side, side): how far key m lies behind query n."""
        place = torch.arange(side, device=device)
        return place[None, :] - place[:, None]
