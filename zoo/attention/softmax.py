"""Scaled dot-product attention, with the spatial reduction of keys that PVT adds to it.

Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1; spatial reduction: Wang et al.,
"Pyramid Vision Transformer", arXiv 2102.12122, equations 1 to 3; locally enhanced positional encoding: Dong et al.,
"CSWin Transformer", arXiv 2107.00652, equation 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, check_heads, logit_bias, zero_without_keys
from zoo.attention.depthwise import check_kernel, depthwise_tokens
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention


@register_attention(
    "softmax",
    paper="Attention Is All You Need, arXiv 1706.03762",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
)
class SoftmaxAttention(Attention):
    """Multi-head softmax(q k^T / sqrt(d)) v over tokens; torch's fused kernel computes it.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        qk_norm: LayerNorm (eps 1e-6) over each head of q and k.
        sr_ratio: keys and values come from a grid reduced this many times along each side by a convolution of that
            stride and a LayerNorm; a grid it does not divide is padded. Prefix tokens stay keys of their own.
        lepe: kernel size of a depthwise convolution of v over the grid, added to the answer (locally enhanced
            positional encoding); 0 for none.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    With `sr_ratio` > 1 key_mask still speaks of the tokens (a reduced cell may be attended if any of its tokens may)
    and bias of the reduced keys.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        sr_ratio: int = 1,
        lepe: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.num_heads = num_heads
        self.head_dim = check_heads("softmax", self.dim_out, num_heads)
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        if sr_ratio < 1:
            raise ValueError(f"attention 'softmax': sr_ratio={sr_ratio}, it must be at least 1 (1 = no reduction)")
        if sr_ratio > 1 and lepe:
            raise UsageError(f"attention 'softmax': lepe={lepe} needs a value for every token, but sr_ratio={sr_ratio}")
        # TorchScript compiles only the branch whose layers are there, if the others are None.
        whole = sr_ratio == 1
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias) if whole else None
        self.q = None if whole else nn.Linear(dim, self.dim_out, bias=qkv_bias)
        self.kv = None if whole else nn.Linear(dim, 2 * self.dim_out, bias=qkv_bias)
        self.sr = None if whole else nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
        self.norm = None if whole else nn.LayerNorm(dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.crosses_bias = sr_ratio > 1 or lepe > 0
        width, local = self.dim_out, check_kernel("softmax", "lepe", lepe, smallest=0)
        self.lepe = nn.Conv2d(width, width, local, padding=local // 2, groups=width) if local else None
        self.attn_drop = nn.Dropout(attn_drop)
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
        q, k, v, key_mask = self.project(x, grid, key_mask)
        drop = self.attn_drop.p if self.training else 0.0
        out = dot_product_attention(q, k, v, attn_mask=logit_bias(key_mask, bias, q.dtype), dropout_p=drop)
        if self.lepe is not None:
            values = v.transpose(1, 2).flatten(2)
            place = self.token_grid(x, grid)
            local = depthwise_tokens(values, self.lepe.weight, self.lepe.bias, place, self.num_prefix_tokens, key_mask)
            out = out + local.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        out = zero_without_keys(out, key_mask).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, heads, queries, keys); with `sr_ratio` > 1 the keys are the reduced ones."""
        q, k, _, key_mask = self.project(x, grid, key_mask)
        with without_autocast(x):
            logits = (q.float() * self.scale) @ k.float().transpose(-2, -1)
        added = logit_bias(key_mask, bias, torch.float32)
        weights = (logits if added is None else logits + added).softmax(dim=-1)
        return zero_without_keys(weights, key_mask)

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B, heads, tokens, head_dim) and the mask of the keys."""
        batch, count, _ = x.shape
        if self.qkv is not None:
            qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            q = self.q(x).reshape(batch, count, self.num_heads, self.head_dim).transpose(1, 2)
            if self.sr is not None:
                x, key_mask = self.reduce(x, self.token_grid(x, grid), key_mask)
            kv = self.kv(x).reshape(batch, x.shape[1], 2, self.num_heads, self.head_dim)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v, key_mask

    def reduce(self, x: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens that keys and values come from, and their mask."""
        prefix = self.num_prefix_tokens
        pad = [0, -grid[1] % self.sr_ratio, 0, -grid[0] % self.sr_ratio]
        cells = x[:, prefix:]
        if key_mask is not None:
            cells = cells * key_mask[:, prefix:, None]
            open_cells = key_mask[:, prefix:].reshape(-1, 1, grid[0], grid[1]).to(x.dtype)
            open_cells = F.max_pool2d(F.pad(open_cells, pad), self.sr_ratio).flatten(1) > 0
            key_mask = torch.cat([key_mask[:, :prefix], open_cells], dim=1)
        cells = F.pad(cells.transpose(1, 2).unflatten(2, grid), pad)
        cells = self.norm(self.sr(cells).flatten(2).transpose(1, 2))
        return torch.cat([x[:, :prefix], cells], dim=1), key_mask
