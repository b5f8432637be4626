"""What mechanisms with heads of queries, keys and values over tokens share.

Two bases: `FusedAttention` hands q, k and v to torch's fused kernel, which never stores the weights of all pairs;
`MapAttention` forms this map, bounded by `check_map`.
"""

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, check_heads, logit_bias, zero_without_keys
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention

# The most numbers that one tensor over all pairs of tokens may have. 2**31 are 8 GiB in float32, of which training
# keeps several, and where kernels with 32-bit indices end.
MAX_MAP_NUMBERS = 2**31


def check_map(name: str, batch: int, heads: int, queries: int, keys: int, width: int = 1) -> None:
    """Refuses a map over all pairs of tokens that no machine should be asked for.

    The one rule of every mechanism with `forms_map`: its largest tensor, batch * heads * queries * keys * width
    numbers, has at most `MAX_MAP_NUMBERS`. Scripts and exported graphs, whose batch is not known, are not checked.

    Raises:
        ValueError: it would have more; with the largest batch that fits.
    """
    if not torch.jit.is_scripting():
        _check_map(name, batch, heads, queries, keys, width)


@torch.jit.unused
def _check_map(name: str, batch: int, heads: int, queries: int, keys: int, width: int) -> None:
    each = heads * queries * keys * width
    if not torch.compiler.is_exporting() and batch * each > MAX_MAP_NUMBERS:
        raise ValueError(
            f"attention {name!r} forms a map of all pairs of tokens: {batch} images x {heads} heads x {queries} "
            f"queries x {keys} keys x {width} would be {batch * each} numbers, more than {MAX_MAP_NUMBERS}. At most "
            f"{MAX_MAP_NUMBERS // each} of these images go at once; if that is 0, use smaller images, or the mechanism "
            "inside attention 'window'"
        )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, heads * d), head by head, as (B, heads, N, d)."""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) as (B, N, heads * d): the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def masked_softmax(logits: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Weights, float32 or wider, of logits (B, heads, queries, keys); zero for images in which no key may be attended.

    Args:
        logits: any floating dtype.
        key_mask: bool (B or 1, keys), True where a key may be attended.
        bias: broadcastable to the logits, added to them.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    added = logit_bias(key_mask, bias, wide)
    if added is not None:
        logits = logits + added
    return zero_without_keys(logits.softmax(dim=-1), key_mask)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where nothing bounds it, of logits, or of weights that need not sum to 1: in b's dtype, but not in float16.

    The values of float16 end where sums over thousands of tokens, or logits of large tokens, may go: it is float32
    then.
    """
    work = torch.float32 if b.dtype == torch.float16 else b.dtype
    a, b = a.to(work), b.to(work)
    return a @ b if torch.jit.is_scripting() else _matmul(a, b)


@torch.jit.unused
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with without_autocast(a):
        return a @ b


class HeadAttention(Attention):
    """Options and layers of a mechanism with heads; the bases below add how heads are weighed.

    Args:
        name: as registered, for errors.
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of all heads together; `dim` unless given.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        num_heads: int,
        dim_out: int | None,
        attn_drop: float,
        proj_drop: float,
        proj: bool,
        grid_size: Grid,
        num_prefix_tokens: int,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.name = name
        self.num_heads = num_heads
        self.head_dim = check_heads(name, self.dim_out, num_heads)
        self.scale = self.head_dim**-0.5
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.dim_out, self.dim_out) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def finish(self, out: Tensor) -> Tensor:
        """What heads answer, (B, heads, N, d), as the mechanism's answer (B, N, dim_out)."""
        return self.proj_drop(self.proj(join_heads(out)))


class FusedAttention(HeadAttention):
    """softmax(q k^T / sqrt(d)) v by torch's fused kernel; a subclass says what q, k and v are."""

    def project(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d) of x (B, N, dim); only what mixes values over tokens needs grid and key_mask."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        q, k, v = self.project(x, grid, key_mask)
        drop = self.attn_drop.p if self.training else 0.0
        out = dot_product_attention(q, k, v, attn_mask=logit_bias(key_mask, bias, q.dtype), dropout_p=drop)
        return self.finish(zero_without_keys(out, key_mask))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys), float32 or wider."""
        q, k, _ = self.project(x, grid, key_mask)
        return masked_softmax(product(q * self.scale, k.transpose(-2, -1)), key_mask, bias)


class MapAttention(HeadAttention):
    """Weights of all pairs of tokens, formed and applied to v; a subclass says what the weights are.

    q, k and v come from one projection. Memory grows with heads * N^2, bounded by `check_map`.

    Args:
        qkv_bias: biases in the projections to q, k and v.

    The other arguments are those of `HeadAttention`.
    """

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
        super().__init__(name, dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        self.map_width = 1
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)

    def weigh(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Weights (B, heads, N, N), float32 or wider, of q and k (B, heads, N, d); grid None means that of x."""
        raise NotImplementedError

    def attend(
        self, x: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights (B, heads, N, N) and values (B, heads, N, d)."""
        check_map(self.name, x.shape[0], self.num_heads, x.shape[1], x.shape[1], self.map_width)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_heads)
        return self.weigh(q, k, grid, key_mask, bias), split_heads(v, self.num_heads)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        weights, v = self.attend(x, grid, key_mask, bias)
        return self.finish(self.attn_drop(weights).to(v.dtype) @ v)

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys), float32 or wider."""
        return self.attend(x, grid, key_mask, bias)[0]
