"""Lambda layers: attention without weights over keys, by linear maps that the context makes for each query.

Source: Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", arXiv 2102.08602, section 3.
"""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from zoo import kernels
from zoo.attention.base import Attention, Grid, check_heads
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.position import TableResize


@register_attention(
    "lambda",
    paper="LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv 2102.08602",
    prefix="pass",
    # 23**2 places, 4 heads, keys of 16, values of C / 4.
    cost="N*C*(64 + 16 + C/4) + N*(16 + 64)*C/4 + N*4*23**2*(16 + C/4)",
)
class LambdaAttention(Attention):
    """y of head h at n = (content lambda + position lambda of n)^T q; maps (B, dim, H, W) -> (B, dim_out, H', W').

    Keys are a softmax over the positions of the map, one for every channel; queries and values pass a BatchNorm; heads
    share keys and values. Position lambdas reach `kernel_size` places ("lambda convolution"), zero beyond the map, or
    all of it. H' = ceil(H / stride), W' likewise.

    Args:
        dim: channels of x.
        dim_out: channels of the answer; `dim` unless given.
        num_heads: heads of the queries, dim_out / num_heads channels of the answer each.
        dim_key: channels k of a query in one head and of the keys.
        intra_depth: values u of each place and keys of each of these, the paper's |u|.
        kernel_size: side of the square of positions around a query, odd; None for all of the map, from a table made
            for `grid_size` and resized to other grids.
        stride: averages the answer.
        qkv_bias: a bias in the projection.
        proj: whether a projection with bias follows; the paper's networks have none, since a convolution comes next.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Channels of `qkv` are [q | k | v], of q (head, k), of k (u, k), of v (u, channel). The position lambdas of a kernel
    have a bias per channel of the keys, as timm's and lucidrains' have.
    """

    layout = "map"

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        num_heads: int = 4,
        dim_key: int = 16,
        intra_depth: int = 1,
        kernel_size: int | None = 23,
        stride: int = 1,
        qkv_bias: bool = False,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.dim_value = check_heads("lambda", self.dim_out, num_heads)
        if min(dim_key, intra_depth, stride) < 1:
            raise UsageError(
                f"attention 'lambda': dim_key={dim_key}, intra_depth={intra_depth}, stride={stride}; all at least 1"
            )
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise UsageError(f"attention 'lambda': kernel_size={kernel_size}; valid: an odd number, or None for global")
        self.num_heads, self.dim_key, self.intra_depth, self.stride = num_heads, dim_key, intra_depth, stride
        self.splits = [num_heads * dim_key, intra_depth * dim_key, intra_depth * self.dim_value]
        self.qkv = nn.Conv2d(dim, sum(self.splits), 1, bias=qkv_bias)
        self.norm_q = nn.BatchNorm2d(self.splits[0])
        self.norm_v = nn.BatchNorm2d(self.splits[2])
        local = kernel_size is not None
        rows, columns = (kernel_size, kernel_size) if kernel_size is not None else self._table_grid(self.grid_size)
        self.pos_emb = nn.Parameter(torch.empty(rows, columns, dim_key, intra_depth))
        self.pos_bias = nn.Parameter(torch.zeros(dim_key)) if local else None
        self.resize = None if local else TableResize((rows, columns))
        self.pool = (
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        )
        self.proj = nn.Conv2d(self.dim_out, self.dim_out, 1) if proj else nn.Identity()
        # Projections start as the paper's, of variance 1 / (k d) for queries and 1 / d for keys and values; positions
        # as timm's, which trained networks with theirs, and not with variance 1.
        trunc_normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.qkv.weight[: self.splits[0]].data, std=(dim_key * dim) ** -0.5)
        trunc_normal_(self.pos_emb, std=dim_key**-0.5 if local else 0.02)

    @staticmethod
    def _table_grid(grid: tuple[int, int]) -> tuple[int, int]:
        return 2 * grid[0] - 1, 2 * grid[1] - 1

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
                "attention 'lambda' takes neither key_mask nor bias: it has no logits of pairs; use 'softmax' for that"
            )
        q, k, v = self.project(x)
        content = k.transpose(1, 2) @ v.flatten(1, 3).to(k.dtype)
        if self.pos_bias is not None:
            # It belongs to every position lambda alike, whatever the values are.
            content = content + self.pos_bias.to(content.dtype)[:, None]
        out = self.attend(q, v) + self._answer(q, content.to(q.dtype))
        return self.proj(self.pool(out.flatten(3).permute(0, 3, 1, 2)))

    def attention_map(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """float32 factors (B, heads, queries, H*W) of the normalised values, signed; `pos_bias` comes on top.

        With an intra-depth of several values the factors of a place's values are summed.
        """
        q, k, _ = self.project(x)
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        each = torch.eye(height * width, device=x.device).view(1, height, width, 1, -1)
        each = each.expand(batch, -1, -1, self.intra_depth, -1)
        with without_autocast(x):
            content = k.float().transpose(1, 2) @ each.flatten(1, 3)
            factors = self.attend(q.float(), each) + self._answer(q.float(), content)
        maps = self.pool(factors.flatten(3).permute(0, 3, 1, 2))
        return maps.unflatten(1, (self.num_heads, -1)).flatten(3).transpose(2, 3)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, W, heads, k) and v (B, H, W, u, d), normed; k (B, H*W*u, k), float32 or wider, of sum 1 over H*W."""
        q, k, v = self.qkv(x).split(self.splits, dim=1)
        # Of a part of a map's channels, batch norm backward takes ten times a copy and cuDNN's batch norm together.
        q, v = q.contiguous(memory_format=torch.channels_last), v.contiguous(memory_format=torch.channels_last)
        q = self.norm_q(q).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, self.dim_key))
        v = self.norm_v(v).permute(0, 2, 3, 1).unflatten(3, (self.intra_depth, self.dim_value))
        # In the order in which the map lies, so that its gradient does too.
        k = k.permute(0, 2, 3, 1).flatten(1, 2).softmax(dim=1, dtype=torch.promote_types(k.dtype, torch.float32))
        return q, k.unflatten(2, (self.intra_depth, self.dim_key)).flatten(1, 2), v

    @staticmethod
    def _answer(q: Tensor, content: Tensor) -> Tensor:
        return (q.flatten(1, 3) @ content).unflatten(1, (q.shape[1], q.shape[2], q.shape[3]))

    def attend(self, q: Tensor, v: Tensor) -> Tensor:
        """What the position lambdas (without their bias) make of queries: (B, H, W, heads, channels of v)."""
        table = self.pos_emb
        if self.resize is not None:
            wanted = self._table_grid((q.shape[1], q.shape[2]))
            table = self.resize(table.flatten(0, 1).flatten(1).unsqueeze(0), wanted)
            table = table.view(wanted[0], wanted[1], self.dim_key, self.intra_depth)
        return kernels.lambda_attention(q, v, table)
