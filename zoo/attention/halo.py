"""Blocked local self-attention with halos.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731,
section 3; relative positions as in Shaw et al., arXiv 1803.02155, one table along each axis.
"""

import torch
from timm.layers import make_divisible, trunc_normal_
from torch import Tensor, nn

from zoo import kernels
from zoo.attention.base import Attention, Grid, check_heads
from zoo.attention.registry import register_attention
from zoo.errors import UsageError, unknown

# What tells the published layers apart: whether keys outside the map are hidden, whether the positions' part of the
# logits is scaled, whether the channels of keys and values lie side by side in each head.
PRESETS = {
    "zoo": {"mask": True, "scale_rel": False, "kv_by_head": True},
    "timm": {"mask": False, "scale_rel": False, "kv_by_head": True},
    "lucidrains": {"mask": True, "scale_rel": True, "kv_by_head": False},
}


class RelativePositions(nn.Module):
    """Two tables of relative positions, one row for every offset of a key from its query, shared by the heads."""

    def __init__(self, window: int, dim: int):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        trunc_normal_(self.height_rel, std=dim**-0.5)
        trunc_normal_(self.width_rel, std=dim**-0.5)


@register_attention(
    "halo",
    paper="Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731",
    prefix="pass",
    cost="3*N*C**2 + 2*N*C*(8 + 2*3)**2",
)
class HaloAttention(Attention):
    """Softmax attention of each block of pixels to the block and the halo around it, with relative positions.

    Maps (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)). Any size: blocks may lie partly beyond the
    map; what pads them is never seen. Logits of head h: (q.k + q.r) / sqrt(dk), of which `scale_rel=False` leaves q.r
    unscaled.

    Args:
        dim: channels of x.
        dim_out: channels of the answer and of all values; `dim` unless given.
        num_heads: heads.
        block_size: side of a block.
        halo_size: how far the keys of a block reach beyond it.
        stride: every stride-th query; where it does not divide the block, an average of the answer.
        dim_head: channels of a query and a key in one head; dim_out * qk_ratio / num_heads unless given.
        qk_ratio: channels of all queries, in `dim_out`.
        qkv_bias: a bias in the projections.
        proj: whether a projection with bias follows; the paper's networks have none, since a convolution comes next.
        preset: "timm" or "lucidrains" for those implementations' layer, "zoo" for ours; it decides what stays None of:
        mask: hide keys outside the map ("zoo", "lucidrains") or let a border of zeros, halo_size wide, take part.
        scale_rel: scale the positions' part of the logits too ("lucidrains").
        kv_by_head: channels of kv are [keys | values] of each head ("zoo", "timm") or all keys, then all values.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Of lucidrains' layer, "lucidrains" is what it means to do: its release hides the map and shows the padding.
    """

    layout = "map"

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        proj: bool = True,
        preset: str = "zoo",
        mask: bool | None = None,
        scale_rel: bool | None = None,
        kv_by_head: bool | None = None,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        if preset not in PRESETS:
            raise unknown("preset of attention 'halo':", preset, PRESETS)
        switches = PRESETS[preset] | {
            key: value
            for key, value in (("mask", mask), ("scale_rel", scale_rel), ("kv_by_head", kv_by_head))
            if value is not None
        }
        self.mask, self.scale_rel = switches["mask"], switches["scale_rel"]
        self.kv_by_head = switches["kv_by_head"]
        self.num_heads, self.block_size, self.halo_size, self.stride = num_heads, block_size, halo_size, stride
        if block_size < 1 or halo_size < 0 or stride < 1:
            raise UsageError(
                f"attention 'halo': block_size={block_size}, halo_size={halo_size}, stride={stride}; "
                "block and stride are at least 1, the halo at least 0"
            )
        self.dim_value = check_heads("halo", self.dim_out, num_heads)
        self.dim_head = make_divisible(self.dim_out * qk_ratio, 8) // num_heads if dim_head is None else dim_head
        if self.dim_head < 1 or qk_ratio <= 0:
            raise UsageError(f"attention 'halo': dim_head={dim_head} with qk_ratio={qk_ratio} leaves no channel a head")
        self.scale = self.dim_head**-0.5
        pooled = block_size % stride != 0
        self.query_stride = 1 if pooled else stride
        self.q = nn.Conv2d(dim, num_heads * self.dim_head, 1, stride=self.query_stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, num_heads * (self.dim_head + self.dim_value), 1, bias=qkv_bias)
        self.pos_embed = RelativePositions(block_size + 2 * halo_size, self.dim_head)
        trunc_normal_(self.q.weight, std=dim**-0.5)
        trunc_normal_(self.kv.weight, std=dim**-0.5)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        self.proj = nn.Conv2d(self.dim_out, self.dim_out, 1) if proj else nn.Identity()

    def out_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return -(-grid[0] // self.stride), -(-grid[1] // self.stride)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, dim, H, W) -> (B, dim_out, H', W'), channels-last; see `Attention` for the rest."""
        if key_mask is not None or bias is not None:
            raise ValueError(
                "attention 'halo' takes neither key_mask nor bias: its keys are those around a block; use 'softmax'"
            )
        q, k, v = self.project(x)
        out = self.attend(q, k, v)
        return self.proj(self.pool(out.flatten(3).permute(0, 3, 1, 2)))

    def attention_map(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """float32 weights (B, heads, queries, H*W); with `mask=False` the border of zeros takes what a row lacks."""
        q, k, _ = self.project(x)
        height, width = x.shape[2], x.shape[3]
        # The answer to values that tell the keys apart: value m is 1 in channel m alone.
        each = torch.eye(height * width, device=x.device).view(1, height, width, 1, -1)
        weights = self.attend(q.float(), k.float(), each.expand(x.shape[0], -1, -1, self.num_heads, -1))
        maps = self.pool(weights.flatten(3).permute(0, 3, 1, 2))
        return maps.unflatten(1, (self.num_heads, -1)).flatten(3).transpose(2, 3)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H', W', heads, dk), keys (B, H, W, heads, dk), values (B, H, W, heads, dv): views."""
        q = self.q(x).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, self.dim_head))
        kv = self.kv(x).permute(0, 2, 3, 1)
        if self.kv_by_head:
            kv = kv.unflatten(3, (self.num_heads, self.dim_head + self.dim_value))
            k, v = kv.split([self.dim_head, self.dim_value], dim=-1)
            return q, k, v
        k, v = kv.split([self.num_heads * self.dim_head, self.num_heads * self.dim_value], dim=-1)
        k = k.unflatten(3, (self.num_heads, self.dim_head))
        return q, k, v.unflatten(3, (self.num_heads, self.dim_value))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H', W', heads, dv) of what `project` answers."""
        return kernels.halo_attention(
            q,
            k,
            v,
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            self.block_size,
            self.halo_size,
            self.scale,
            self.query_stride,
            self.scale_rel,
            self.mask,
        )
