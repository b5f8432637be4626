"""Focused linear attention: cost linear in the tokens, sharpness by a power of queries and keys.

Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", arXiv 2308.00442,
equations 4 to 8; the order of sums is that of the authors' release of May 2024 (means instead of sums).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import kernels
from zoo.attention.base import Attention, Grid, check_heads
from zoo.attention.depthwise import check_kernel, depthwise_tokens
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.focused_linear_attention.reference import by_head, focus, focused_keys, normalised
from zoo.kernels.precision import without_autocast
from zoo.layers.position import TableResize


@register_attention(
    "focused_linear",
    paper="FLatten Transformer: Vision Transformer using Focused Linear Attention, arXiv 2308.00442",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N*C**2/8 + 25*N*C",
    fixed_grid=True,
)
class FocusedLinearAttention(Attention):
    """y_n = sum_m w_nm v_m + dwc(v)_n with w_nm = f(q_n) f(k_m) / sum_j f(q_n) f(k_j), then a projection.

    f takes the ReLU, divides by a learned scale a channel and raises to a power, keeping the norm over all channels.
    The weights are never formed: f(k)^T v is summed first, one head_dim x head_dim matrix a head.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        focusing_factor: the power; 1 is plain ReLU linear attention.
        kernel_size: of the depthwise convolution of v, one kernel a channel of a head, shared by the heads.
        lepe: kernel size of a second one with a kernel for every channel, as CSWin adds it; 0 for none.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them; keys carry a learned table of positions, made
            for this grid and resized to others.

    A masked key counts neither in sums nor in means, and is zero for the convolutions.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        focusing_factor: int = 3,
        kernel_size: int = 5,
        lepe: int = 0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.num_heads = num_heads
        self.head_dim = check_heads("focused_linear", self.dim_out, num_heads)
        if focusing_factor < 1:
            raise UsageError(f"attention 'focused_linear': focusing_factor={focusing_factor}, it must be at least 1")
        self.focusing_factor = focusing_factor
        kernel = check_kernel("focused_linear", "kernel_size", kernel_size)
        local = check_kernel("focused_linear", "lepe", lepe, smallest=0)
        rows = num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        self.scale = nn.Parameter(torch.zeros(1, 1, self.dim_out))
        self.positional_encoding = nn.Parameter(torch.zeros(1, rows, self.dim_out))
        self.resize = TableResize(self.grid_size, num_prefix_tokens)
        self.dwc = nn.Conv2d(self.head_dim, self.head_dim, kernel, padding=kernel // 2, groups=self.head_dim)
        width = self.dim_out
        self.lepe = nn.Conv2d(width, width, local, padding=local // 2, groups=width) if local else None
        self.proj = nn.Linear(self.dim_out, self.dim_out) if proj else nn.Identity()
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
            raise ValueError("attention 'focused_linear' has no logits, so it takes no bias; use 'softmax' for that")
        grid = self.token_grid(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        positions = self.resize(self.positional_encoding, grid)
        out = kernels.focused_linear_attention(
            q, k, v, positions, self.stretch(v), self.num_heads, self.focusing_factor, key_mask
        )
        out = out + self.depthwise(v, grid, key_mask)
        if key_mask is not None:
            out = out.masked_fill(~key_mask.any(dim=1)[:, None, None], 0.0)
        return self.proj_drop(self.proj(out))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, heads, queries, keys) that forward implies, without the depthwise terms.

        A row sums to 1 minus the share of the normaliser's 1e-6.
        """
        grid = self.token_grid(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        wide, scale, power = torch.promote_types(v.dtype, torch.float32), self.stretch(v), self.focusing_factor
        with without_autocast(x):
            keys = focused_keys(k.to(wide), self.resize(self.positional_encoding, grid), scale, power, key_mask)
            queries = normalised(focus(q.to(wide), scale, power), keys, self.num_heads)
            queries, keys = by_head(queries.float(), self.num_heads), by_head(keys.float(), self.num_heads)
            weights = (queries @ keys.transpose(1, 2)) * x.shape[1] ** -0.5
        return weights.unflatten(0, (x.shape[0], self.num_heads))

    def stretch(self, like: Tensor) -> Tensor:
        """What divides each channel of queries and keys: (dim_out,), positive, float32 or wider."""
        return F.softplus(self.scale.to(torch.promote_types(like.dtype, torch.float32))).flatten()

    def depthwise(self, v: Tensor, grid: tuple[int, int], key_mask: Tensor | None = None) -> Tensor:
        """What is added to the weighted values: the convolutions of v (B, tokens, C)."""
        # (heads, head_dim) is the order of the channels, so one kernel a head repeats.
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1)
        offset = self.dwc.bias
        if offset is not None:
            offset = offset.repeat(self.num_heads)
        out = depthwise_tokens(v, weight, offset, grid, self.num_prefix_tokens, key_mask)
        if self.lepe is not None:
            local = depthwise_tokens(v, self.lepe.weight, self.lepe.bias, grid, self.num_prefix_tokens, key_mask)
            out = out + local
        return out
