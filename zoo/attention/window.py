"""Windows, shifted windows and cross-shaped windows over any inner mechanism.

Source: Liu et al., "Swin Transformer", arXiv 2103.14030, sections 3.2 (windows, cyclic shift) and equation 4 (relative
position bias); Dong et al., "CSWin Transformer", arXiv 2107.00652, section 3.2 (stripes of both directions).

A grid that the window does not divide is padded and the padding masked, so the inner mechanism has to take a key mask
there. Prefix tokens take part in every window; their answer is the mean over the windows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from zoo.attention.adapters import given
from zoo.attention.base import MASKED, Attention, Grid
from zoo.attention.registry import attention_spec, create_attention, register_attention
from zoo.errors import UsageError


class Cut(NamedTuple):
    """One way to cut a grid into windows; `split` and `join` follow it. Every field is (rows, columns).

    A shift is done by rolling the grid (a bias must then keep the pieces of a window apart in all that the inner
    mechanism does) or else by padding before the grid, which needs a key mask alone but more windows.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    roll: tuple[int, int]
    before: tuple[int, int]
    padded: tuple[int, int]


def make_cut(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0), cyclic: bool = False
) -> Cut:
    """The cut of a grid into windows moved by `shift`; a side that one window covers is one window, unshifted."""
    height, width = min(window[0], grid[0]), min(window[1], grid[1])
    down = shift[0] if grid[0] > window[0] else 0
    right = shift[1] if grid[1] > window[1] else 0
    roll, before = (down, right), (0, 0)
    if not cyclic:
        roll, before = (0, 0), ((height - down) % height, (width - right) % width)
    rows = (grid[0] + before[0] + height - 1) // height * height
    columns = (grid[1] + before[1] + width - 1) // width * width
    return Cut(grid, (height, width), roll, before, (rows, columns))


def split(x: Tensor, cut: Cut) -> Tensor:
    """(B, H, W, C) -> (B, windows, h*w, C), windows row by row; padding is zero (False)."""
    (rows, columns), (h, w) = cut.padded, cut.window
    top, left = cut.before
    if cut.padded != cut.grid:
        x = F.pad(x, (0, 0, left, columns - left - cut.grid[1], top, rows - top - cut.grid[0]))
    if cut.roll != (0, 0):
        x = x.roll((-cut.roll[0], -cut.roll[1]), dims=(1, 2))
    x = x.reshape(x.shape[0], rows // h, h, columns // w, w, x.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def windows_of(cut: Cut) -> int:
    """How many windows the grid is cut into."""
    return cut.padded[0] // cut.window[0] * (cut.padded[1] // cut.window[1])


def join(x: Tensor, cut: Cut) -> Tensor:
    """(B, windows, h*w, C) -> (B, H*W, C), the inverse of `split`."""
    (rows, columns), (h, w) = cut.padded, cut.window
    top, left = cut.before
    x = x.reshape(x.shape[0], rows // h, columns // w, h, w, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], rows, columns, x.shape[-1])
    if cut.roll != (0, 0):
        x = x.roll(cut.roll, dims=(1, 2))
    if cut.padded != cut.grid:
        x = x[:, top : top + cut.grid[0], left : left + cut.grid[1]]
    return x.flatten(1, 2)


def window_tokens(x: Tensor, cut: Cut, prefix: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens of every window (B * windows, P + h*w, C) and their key mask, None where every key may be attended."""
    batch = x.shape[0]
    windows = split(x[:, prefix:].unflatten(1, cut.grid), cut)
    count = windows.shape[1]
    mask: Tensor | None = None
    if key_mask is not None or cut.padded != cut.grid:
        seen = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        inside = split(seen[:, prefix:].unflatten(1, cut.grid).unsqueeze(-1), cut).squeeze(-1)
        inside = torch.cat([seen[:, :prefix].unsqueeze(1).expand(-1, count, -1), inside], dim=2)
        mask = inside.expand(batch, -1, -1).flatten(0, 1)
    if prefix > 0:
        windows = torch.cat([x[:, :prefix].unsqueeze(1).expand(-1, count, -1, -1), windows], dim=2)
    return windows.flatten(0, 1), mask


def grid_tokens(out: Tensor, cut: Cut, prefix: int, batch: int) -> Tensor:
    """The answer (B * windows, P + h*w, C) of the windows as tokens (B, P + H*W, C)."""
    out = out.unflatten(0, (batch, windows_of(cut)))
    cells = join(out[:, :, prefix:], cut)
    return torch.cat([out[:, :, :prefix].mean(dim=1), cells], dim=1) if prefix > 0 else cells


def window_bias(cut: Cut, table: Tensor | None, prefix: int, x: Tensor, masked: float = MASKED) -> Tensor | None:
    """Bias (1 or B * windows, heads or 1, P + h*w, P + h*w): relative positions, and what a roll joined apart."""
    bias = table
    if cut.roll != (0, 0):
        row = torch.arange(cut.padded[0], device=x.device) >= cut.padded[0] - cut.roll[0]
        column = torch.arange(cut.padded[1], device=x.device) >= cut.padded[1] - cut.roll[1]
        piece = (2 * row[:, None].int() + column[None, :].int())[None, :, :, None]
        piece = split(piece, make_cut(cut.padded, cut.window))[0, :, :, 0]
        apart = (piece[:, :, None] != piece[:, None, :])[:, None]
        pieces = torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, masked)
        bias = (pieces if table is None else pieces + table).repeat(x.shape[0], 1, 1, 1)
    if bias is not None and prefix > 0:
        bias = F.pad(bias, (prefix, 0, prefix, 0))
    return bias


def grid_weights(local: Tensor, cut: Cut, prefix: int, batch: int) -> Tensor:
    """Weights (B * windows, heads, P + h*w, P + h*w) put at their places in (B, heads, P + H*W, P + H*W)."""
    local = local.unflatten(0, (batch, windows_of(cut)))
    count, total = local.shape[1], prefix + cut.grid[0] * cut.grid[1]
    # Places count from 1 so that padding, which `split` fills with zero, falls on a row and column cut off below.
    places = torch.arange(prefix + 1, total + 1, device=local.device).reshape(1, cut.grid[0], cut.grid[1], 1)
    places = split(places, cut)[0, :, :, 0]
    places = torch.cat([torch.arange(1, prefix + 1, device=local.device).expand(count, -1), places], dim=1)
    full = local.new_zeros(batch, local.shape[2], total + 1, total + 1)
    for window, place in enumerate(places):
        share = torch.where((place > 0) & (place <= prefix), 1 / count, 1.0)[:, None]
        full[:, :, place[:, None], place[None, :]] += local[:, window] * share
    return full[:, :, 1:, 1:]


class _Windowed(Attention):
    """What the wrappers refuse alike."""

    def __init__(self, dim: int, dim_out: int | None, grid_size: Grid, num_prefix_tokens: int, inner: str):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        spec = attention_spec(inner)
        self.inner_name = inner
        self.inner_biased = "bias" in spec.supports
        self.inner_masked = "key_mask" in spec.supports
        if num_prefix_tokens and spec.prefix != "mix":
            raise UsageError(
                f"windows over attention {inner!r} take no prefix tokens (class token, registers), because {inner!r} "
                "does not mix them; use a network without them (in zoo_vit_*: class_token=False, global_pool='avg')"
            )

    def check(self, cut: Cut, key_mask: Tensor | None, bias: Tensor | None) -> None:
        """Refuses what the inner mechanism cannot do."""
        if bias is not None:
            raise ValueError("attention in windows takes no bias over the whole grid; 'window' has rel_pos_bias=True")
        if not self.inner_masked and (key_mask is not None or cut.padded != cut.grid):
            raise ValueError(
                f"attention '{self.inner_name}' takes no key mask, so nothing may be masked and its windows "
                f"{cut.window} must divide the grid {cut.grid} without a shift"
            )


def _pair(name: str, value: int | tuple[int, int]) -> Grid:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise UsageError(f"{name}={value!r}: give a positive number or a pair of them (height, width)")
    return pair


@register_attention(
    "window",
    paper="Swin Transformer, arXiv 2103.14030",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="N / w**2 * inner(N=w**2)",
)
class WindowAttention(_Windowed):
    """The inner mechanism inside windows of a fixed size.

    Args:
        dim: channels of x.
        inner: name of the mechanism inside a window.
        inner_options: its options.
        window_size: height and width of a window; one larger than the grid shrinks to it.
        rel_pos_bias: a learned bias for every relative position and head; the inner mechanism has to take a bias.
        dim_out: channels of the answer, if the inner mechanism takes this option.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Raises:
        UsageError: the inner mechanism does not support what the windows need from it.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: str = "softmax",
        inner_options: Mapping[str, Any] | None = None,
        window_size: int | tuple[int, int] = 7,
        rel_pos_bias: bool = False,
        dim_out: int | None = None,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens, inner)
        self.window_size = _pair("window_size", window_size)
        self.shift_size = (0, 0)
        options = dict(inner_options or {}) | ({} if dim_out is None else {"dim_out": dim_out})
        self.inner = create_attention(
            inner, dim, grid_size=self.window_size, num_prefix_tokens=num_prefix_tokens, **options
        )
        # Prefix tokens see the windows that padding leaves, with and without a mask of keys.
        self.rolls = self.inner_biased and not (self.inner.crosses_bias or num_prefix_tokens)
        if rel_pos_bias:
            if not self.inner_biased:
                raise UsageError(f"rel_pos_bias needs an inner mechanism that takes a bias; {inner!r} does not")
            if getattr(self.inner, "sr_ratio", 1) > 1:
                raise UsageError(
                    f"rel_pos_bias is for as many keys as a window has cells, but sr_ratio={self.inner.sr_ratio} of "
                    f"{inner!r} makes fewer; leave one of the two out"
                )
            height, width = self.window_size
            heads = getattr(self.inner, "num_heads", 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads))
            trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            self.register_parameter("relative_position_bias_table", None)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        cut = self.cut(self.token_grid(x, grid), key_mask is not None)
        self.check(cut, key_mask, bias)
        windows, mask = window_tokens(x, cut, self.num_prefix_tokens, key_mask)
        added = window_bias(cut, self.relative_bias(cut.window), self.num_prefix_tokens, x)
        out = self.inner(windows, cut.window, key_mask=mask, bias=added)
        return grid_tokens(out, cut, self.num_prefix_tokens, x.shape[0])

    def attention_map(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Weights (B, heads, queries, keys), zero outside the window of a query."""
        cut = self.cut(self.token_grid(x, grid))
        windows, mask = window_tokens(x, cut, self.num_prefix_tokens, None)
        added = window_bias(cut, self.relative_bias(cut.window), self.num_prefix_tokens, x)
        local = self.inner.attention_map(windows, cut.window, **given(key_mask=mask, bias=added))
        return grid_weights(local, cut, self.num_prefix_tokens, x.shape[0])

    def cut(self, grid: tuple[int, int], masked: bool = False) -> Cut:
        """`masked`: whether keys are. A rolled window whose own piece has none left would attend to another's."""
        return make_cut(grid, self.window_size, self.shift_size, self.rolls and not masked)

    def relative_bias(self, window: tuple[int, int]) -> Tensor | None:
        """(1, heads, h*w, h*w) for a window (h, w) no larger than `window_size`; None without a table."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        height, width = self.window_size
        rows = torch.arange(window[0], device=table.device)
        columns = torch.arange(window[1], device=table.device)
        down = rows[:, None, None, None] - rows[None, None, :, None] + height - 1
        right = columns[None, :, None, None] - columns[None, None, None, :] + width - 1
        index = (down * (2 * width - 1) + right).reshape(window[0] * window[1], -1)
        # Fused attention on a GPU wants keys side by side in memory, and gives way to a float32 map otherwise.
        return table[index].permute(2, 0, 1)[None].contiguous()


@register_attention(
    "shifted_window",
    paper="Swin Transformer, arXiv 2103.14030",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="N / w**2 * inner(N=w**2)",
)
class ShiftedWindowAttention(WindowAttention):
    """Windows moved by `shift_size` (half a window unless given), as every second block of Swin has them.

    A side that one window covers is not shifted. The other arguments are those of `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: str = "softmax",
        inner_options: Mapping[str, Any] | None = None,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] | None = None,
        rel_pos_bias: bool = False,
        dim_out: int | None = None,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            dim,
            inner=inner,
            inner_options=inner_options,
            window_size=window_size,
            rel_pos_bias=rel_pos_bias,
            dim_out=dim_out,
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
        )
        height, width = self.window_size
        self.shift_size = (height // 2, width // 2) if shift_size is None else _pair("shift_size", shift_size)
        if self.shift_size[0] >= height or self.shift_size[1] >= width:
            raise UsageError(f"shift_size={shift_size!r} must be smaller than the window {self.window_size}")


@register_attention(
    "cross_window",
    paper="CSWin Transformer, arXiv 2107.00652",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="N / (H*s) * inner(N=H*s, C/2) + N / (W*s) * inner(N=W*s, C/2)",
)
class CrossWindowAttention(_Windowed):
    """Half of the channels attend inside vertical stripes, half inside horizontal ones; a projection joins them.

    Args:
        dim: channels of x.
        inner: name of the mechanism inside a stripe. It has to take the option `dim_out`: each half projects all
            channels to its half. Its own output projection is left out; `num_heads` counts the heads of both halves.
        inner_options: its options.
        stripe_width: columns of a vertical and rows of a horizontal stripe.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Raises:
        UsageError: the inner mechanism cannot project to half of the channels, or does not support what stripes need.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: str = "softmax",
        inner_options: Mapping[str, Any] | None = None,
        stripe_width: int = 7,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim, grid_size, num_prefix_tokens, inner)
        known = attention_spec(inner).options
        if "dim_out" not in known:
            raise UsageError(f"cross_window needs an inner mechanism with the option dim_out; {inner!r} has none")
        options = dict(inner_options or {}) | {"dim_out": dim // 2}
        if dim % 2:
            raise UsageError(f"cross_window halves the channels, but dim={dim} is odd")
        if "proj" in known:
            options.setdefault("proj", False)
        if "num_heads" in known:
            heads = options.get("num_heads", known["num_heads"])
            if heads % 2:
                raise UsageError(
                    f"cross_window halves the heads, but num_heads={heads} is odd; give an even number that divides "
                    f"{dim}: inner_options={{'num_heads': N}}, in a network "
                    "attn_options={'inner_options': {'num_heads': N}}"
                )
            options["num_heads"] = heads // 2
        if not isinstance(stripe_width, int) or stripe_width < 1:
            raise UsageError(f"stripe_width={stripe_width!r}: give a positive whole number")
        self.stripe_width = stripe_width
        stripes = ((grid_size[0], self.stripe_width), (self.stripe_width, grid_size[1]))
        self.branches = nn.ModuleList(
            create_attention(inner, dim, grid_size=stripe, num_prefix_tokens=num_prefix_tokens, **options)
            for stripe in stripes
        )
        self.proj = nn.Linear(dim, dim) if proj else nn.Identity()

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim); see `Attention` for the rest."""
        grid = self.token_grid(x, grid)
        halves: list[Tensor] = []
        for index, branch in enumerate(self.branches):
            cut = self.cut(grid, index)
            self.check(cut, key_mask, bias)
            windows, mask = window_tokens(x, cut, self.num_prefix_tokens, key_mask)
            out = branch(windows, cut.window, key_mask=mask)
            halves.append(grid_tokens(out, cut, self.num_prefix_tokens, x.shape[0]))
        return self.proj(torch.cat(halves, dim=-1))

    def attention_map(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Weights (B, heads, queries, keys): the heads of the vertical stripes first."""
        grid, halves = self.token_grid(x, grid), []
        for index, branch in enumerate(self.branches):
            cut = self.cut(grid, index)
            windows, mask = window_tokens(x, cut, self.num_prefix_tokens, None)
            local = branch.attention_map(windows, cut.window, **given(key_mask=mask))
            halves.append(grid_weights(local, cut, self.num_prefix_tokens, x.shape[0]))
        return torch.cat(halves, dim=1)

    def cut(self, grid: tuple[int, int], branch: int) -> Cut:
        """Vertical stripes for branch 0, horizontal ones for branch 1."""
        return make_cut(grid, (grid[0], self.stripe_width) if branch == 0 else (self.stripe_width, grid[1]))
