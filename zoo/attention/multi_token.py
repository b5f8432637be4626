"""Multi-token attention: convolutions over queries and keys let neighbouring pairs decide together.

Source: Golovneva et al., "Multi-Token Attention", arXiv 2504.00927, section 3, with the choices of the authors'
release. Low confidence on images: published for causal text. Here both axes of the convolutions are those of the grid,
and the gate starts at a half.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import MapAttention, masked_softmax, product
from zoo.attention.base import Grid
from zoo.attention.depthwise import check_kernel
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast


@register_attention(
    "multi_token",
    paper="Multi-Token Attention, arXiv 2504.00927",
    supports=("key_mask", "prefix"),
    prefix="mix",
    # 8 heads; kernels of 3**4 numbers and mixing of all heads, before and after the softmax.
    cost="4*N*C**2 + 2*N**2*C + N**2*(2*8*3**4 + 2*8**2)",
    forms_map=True,
    confidence="low",
)
class MultiTokenAttention(MapAttention):
    """norm(mix2(conv2(softmax(mix1(conv1(q k^T / sqrt(d)))))) v): conv over places of query and key, mix over heads.

    conv has a kernel a head over (row and column of the query, row and column of the key), zeros around the grid; mix1
    is a matrix over all heads, mix2 one over the heads of a group. All start as the identity. norm is RMSNorm over the
    channels of a head, times a gate, sigmoid(w . o + b), of every head and query. Prefix tokens take no part in conv.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        query_kernel, key_kernel: sides of the kernels over places of queries and of keys, odd.
        head_group: heads that mix2 mixes with each other; divides `num_heads`. The largest divisor up to 16 unless
            given; 1 leaves only a factor a head.
        norm: whether norm and gate are there.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    A masked token counts in conv as if the grid ended before it, as key and as query. A bias would have to be kept
    from spreading: there is none. Forms several maps of N x N, bounded by `check_map`, in float32 or wider.
    """

    undecayed = ("logit_kernel", "weight_kernel", "logit_mix", "weight_mix")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        query_kernel: int = 3,
        key_kernel: int = 3,
        head_group: int | None = None,
        norm: bool = True,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "multi_token", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        group = max(n for n in divisors if n <= 16) if head_group is None else head_group
        if group not in divisors:
            raise UsageError(
                f"attention 'multi_token': head_group={head_group} does not divide {num_heads} heads; valid: {divisors}"
            )
        query = check_kernel("multi_token", "query_kernel", query_kernel)
        key = check_kernel("multi_token", "key_kernel", key_kernel)
        # The query's places along one axis: with five axes no network that holds this could be made channels-last.
        kernel = torch.zeros(num_heads, query**2, key, key)
        kernel[:, query**2 // 2, key // 2, key // 2] = 1
        self.query_kernel = query
        self.logit_kernel, self.weight_kernel = nn.Parameter(kernel), nn.Parameter(kernel.clone())
        self.logit_mix = nn.Parameter(torch.eye(num_heads))
        self.weight_mix = nn.Parameter(torch.eye(group).repeat(num_heads // group, 1, 1))
        self.gain = nn.Parameter(torch.ones(self.head_dim)) if norm else None
        self.gate = nn.Parameter(torch.zeros(self.head_dim)) if norm else None
        self.gate_bias = nn.Parameter(torch.zeros(1)) if norm else None

    def weigh(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Weights (B, heads, N, N) of any sign and sum."""
        if bias is not None:
            raise ValueError("attention 'multi_token' takes no bias, which it would spread; use 'softmax' for that")
        grid = self.token_grid(q[:, 0], grid)
        logits = product(q * self.scale, k.transpose(-2, -1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if torch.jit.is_scripting():
            return self._mix(logits, grid, key_mask)
        return self._mix_precisely(logits, grid, key_mask)

    def _mix(self, logits: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        hidden: Tensor | None = None
        if key_mask is not None:
            hidden = ~(key_mask[:, None, :, None] & key_mask[:, None, None, :])
            logits = logits.masked_fill(hidden, 0.0)
        logits = torch.einsum(
            "bhqk,gh->bgqk", self.convolve(logits, self.logit_kernel, grid), self.logit_mix.to(logits.dtype)
        )
        weights = masked_softmax(logits, key_mask, None)
        if hidden is not None:
            weights = weights.masked_fill(hidden, 0.0)
        weights = self.convolve(weights, self.weight_kernel, grid)
        if key_mask is not None:
            weights = weights.masked_fill(~key_mask[:, None, None, :], 0.0)
        weights = weights.unflatten(1, (self.weight_mix.shape[0], self.weight_mix.shape[1]))
        return torch.einsum("bgaqk,gac->bgcqk", weights, self.weight_mix.to(weights.dtype)).flatten(1, 2)

    @torch.jit.unused
    def _mix_precisely(self, logits: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        with without_autocast(logits):
            return self._mix(logits, grid, key_mask)

    def convolve(self, x: Tensor, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
        """Kernel (heads, a * a, c, c) over the pairs of places in x (B, heads, N, N); pairs with prefix tokens pass."""
        prefix, batch, heads = self.num_prefix_tokens, x.shape[0], x.shape[1]
        height, width = grid
        side = self.query_kernel
        reach = side // 2
        # (B, rows, columns of queries, heads, rows, columns of keys)
        cells = x[:, :, prefix:, prefix:].unflatten(3, grid).unflatten(2, grid).permute(0, 2, 3, 1, 4, 5)
        cells = F.pad(cells, [0, 0, 0, 0, 0, 0, reach, reach, reach, reach])
        out = torch.zeros(batch * height * width, heads, height, width, dtype=x.dtype, device=x.device)
        for row in range(side):
            for column in range(side):
                moved = cells[:, row : row + height, column : column + width].flatten(0, 2)
                of_keys = kernel[:, row * side + column].unsqueeze(1).to(x.dtype)
                out = out + F.conv2d(moved, of_keys, padding=kernel.shape[3] // 2, groups=heads)
        out = out.flatten(2).unflatten(0, (batch, height * width)).transpose(1, 2)
        if prefix > 0:
            out = torch.cat([x[:, :, prefix:, :prefix], out], dim=3)
            out = torch.cat([x[:, :, :prefix], out], dim=2)
        return out

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        weights, v = self.attend(x, grid, key_mask, bias)
        out = product(self.attn_drop(weights), v).to(weights.dtype)
        if self.gain is not None and self.gate is not None and self.gate_bias is not None:
            out = out * (out.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * self.gain
            out = out * ((out * self.gate).sum(dim=-1, keepdim=True) + self.gate_bias).sigmoid()
        return self.finish(out.to(v.dtype))
