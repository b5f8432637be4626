"""Launches of the kernels: how a map is cut, which tiles are used, and what is kept for how long.

Floor for the map of 32 x 32, 4 heads, k 16, 32 channels, batch 128, bf16 on one H100 (3 TB/s, 800 TFLOP/s): queries,
values and the answer are 59 MB, 0.02 ms; the products are 26 GFLOP for 9 x 9 places and 137 for all, 0.03 and 0.17 ms.
Backward three products of that size. Every sum has a fixed order: equal inputs give equal bits.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.lambda_attention.triton_gradients import fold, table_grad, values_grad
from zoo.kernels.lambda_attention.triton_lambdas import apply, expand

INTERPRETED = triton.knobs.runtime.interpret
# Sides of a tile; steps along the contracted dimension.
ROWS, COLUMNS, STEP = 128, 128, 64
WARPS, STAGES = 8, 3
# Entries of an expanded table that exist at once, 64 MiB in bf16: a larger map is worked on in bands of rows.
EXPANDED = 2**25
BLOCKS = ((4, 4), (4, 8), (8, 8), (8, 16))
# Programs that fill a GPU, when their number can be chosen.
PROGRAMS = 264
# What a gradient of lambdas costs, in columns of the product it goes into.
OUTER = 100


@dataclass(frozen=True)
class Cut:
    """Blocks of a map: their sides, how many lie down and across, the window's sides and where it starts."""

    block: tuple[int, int]
    blocks: tuple[int, int]
    window: tuple[int, int]
    start: tuple[int, int]  # of the window, from the start of the block
    origin: int = 0  # row at which the first block starts

    @property
    def places(self) -> int:
        return self.block[0] * self.block[1]

    @property
    def keys(self) -> int:
        return self.window[0] * self.window[1]

    def constants(self) -> dict[str, int]:
        return {"P": self.places, "BX": self.block[1], "N": self.keys, "WX": self.window[1]}


@lru_cache(maxsize=256)
def cuts(height: int, width: int, table: tuple[int, int], depth: int, values: int, backward: bool) -> list[Cut]:
    """How to cut the map: blocks in one launch, or the whole map as one block, in bands of rows where it is large.

    Args:
        height, width, table: sides of the map and of the table.
        depth: k as padded; values: u; backward: whether lambdas' gradients are made for every window.
    """
    reach_y, reach_x = min(table[0] // 2, height - 1), min(table[1] // 2, width - 1)
    whole = Cut((height, width), (1, 1), (height, width), (0, 0))
    candidates = [whole]
    for block in BLOCKS:
        window = (block[0] + 2 * reach_y, block[1] + 2 * reach_x)
        number = (-(-height // block[0]), -(-width // block[1]))
        candidates.append(Cut(block, number, window, (-reach_y, -reach_x)))

    def cost(cut: Cut) -> int:
        blocks = cut.blocks[0] * cut.blocks[1]
        if backward:
            rows = cut.places * values
            return blocks * cut.keys * -(-rows // COLUMNS) * (min(_tile(rows), COLUMNS) + OUTER)
        return blocks * (-(-cut.places * depth // ROWS) * ROWS) * (-(-cut.keys * values // STEP) * STEP)

    best = min(reversed(candidates), key=cost)
    if best.block != whole.block:
        return [best]
    bands = -(-height * width * depth * best.keys * values // EXPANDED)
    rows = -(-height // min(bands, height))
    return [
        replace(whole, block=(min(rows, height - y), width), start=(-y, 0), origin=y) for y in range(0, height, rows)
    ]


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, and those of its tiles."""

    batch: int
    height: int
    width: int
    heads: int
    k: int
    u: int
    d: int
    wide: bool  # float32: half as much fits

    @classmethod
    def of(cls, q: Tensor, v: Tensor) -> "Sizes":
        batch, height, width, heads, k = q.shape
        return cls(batch, height, width, heads, k, v.shape[3], v.shape[4], v.dtype == torch.float32)

    @property
    def depth(self) -> int:
        return _tile(self.k)

    @property
    def step(self) -> int:
        return STEP // 2 if self.wide else STEP

    @property
    def channels(self) -> int:
        return min(self.step if self.wide else COLUMNS, _tile(self.d))

    @property
    def launch(self) -> dict:
        """Three tf32 products make a float32 product; they need the room of a pipeline stage."""
        how = ("tf32x3", 2) if self.wide else ("tf32", STAGES)
        return {"PRECISION": how[0], "num_warps": WARPS, "num_stages": how[1]}

    def constants(self) -> dict[str, int]:
        return {"K": self.k, "KP": self.depth, "U": self.u, "D": self.d, "DP": self.channels, "HEADS": self.heads}

    def map(self, cut: Cut) -> tuple[int, ...]:
        """groups, down, across, height, width, origin_y, window_y, window_x"""
        down, across = cut.blocks
        return (self.batch * down * across, down, across, self.height, self.width, cut.origin, *cut.start)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def expanded(table: Tensor, dtype: torch.dtype, cut: Cut, sizes: Sizes, backward: bool) -> tuple[Tensor, int, int]:
    """(matrix, its tiles of rows, rows of a tile): rows and columns padded with zeros to whole tiles and steps."""
    inner, outer = (sizes.depth, sizes.u) if backward else (sizes.u, sizes.depth)
    tile = min(COLUMNS, _tile(cut.places * outer)) if backward else max(ROWS, outer)
    tiles = -(-cut.places * outer // tile)
    step = max(STEP, sizes.depth)
    columns = -(-cut.keys * inner // step) * step
    out = table.new_empty(tiles * tile, columns, dtype=dtype)
    block = min(1024, triton.next_power_of_2(columns))
    expand[(tiles * tile, triton.cdiv(columns, block))](
        table,
        out,
        *table.stride(),
        *table.shape[:2],
        *cut.start,
        BACKWARD=backward,
        **cut.constants(),
        K=sizes.k,
        KP=sizes.depth,
        U=sizes.u,
        COLUMNS=columns,
        BLOCK=block,
    )
    return out, tiles, tile


def _apply(e: Tensor, tiles: int, tile: int, v: Tensor, factor: Tensor, out: Tensor, cut: Cut, s: Sizes) -> None:
    """Writes the answer to queries (`factor` q), or the gradient of queries (`factor` the answer's gradient)."""
    answer = out.ndim == 5
    groups = COLUMNS // s.channels
    grid = (tiles * triton.cdiv(s.map(cut)[0], groups), triton.cdiv(s.d, s.channels))
    apply[grid](
        e,
        v,
        factor,
        out,
        *s.map(cut),
        tiles,
        *v.stride()[:4],
        *factor.stride()[:4],
        0 if answer else out.stride(0),
        ANSWER=answer,
        BY=cut.block[0],
        **cut.constants(),
        **s.constants(),
        COLUMNS=e.shape[1],
        PLACES=tile // s.depth,
        GROUPS=groups,
        STEP=s.step,
        **s.launch,
    )


def forward(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """(B, H, W, heads, d), dense, in the dtype of v."""
    s = Sizes.of(q, v)
    out = v.new_empty(s.batch, s.height, s.width, s.heads, s.d)
    if out.numel() == 0:
        return out
    q, v = _dense(q), _dense(v)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        for cut in cuts(s.height, s.width, tuple(table.shape[:2]), s.depth, s.u, False):
            _apply(*expanded(table, v.dtype, cut, s, False), v, q, out, cut, s)
    return out


def backward(grad: Tensor, q: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, v and table, dense, in their dtypes."""
    s = Sizes.of(q, v)
    parts = triton.cdiv(s.d, s.channels)
    dtype = q.dtype if parts == 1 else torch.float32
    grad_q = q.new_empty(parts, s.batch, s.height, s.width, s.heads, s.k, dtype=dtype)
    grad_v = v.new_empty(v.shape)
    grad_table = table.new_zeros(table.shape, dtype=torch.float32)
    if grad_q.numel() == 0 or grad_v.numel() == 0:
        return q.new_zeros(q.shape), grad_v.zero_(), grad_table.to(table.dtype)
    q, v, grad = _dense(q), _dense(v), _dense(grad)
    sides = (s.height, s.width, tuple(table.shape[:2]), s.depth, s.u)
    with torch.cuda.device_of(q):
        for cut in cuts(*sides, False):
            _apply(*expanded(table, v.dtype, cut, s, False), v, grad, grad_q, cut, s)
            _table_grad(q, grad, v, grad_table, cut, s)
        for cut in cuts(*sides, True):
            _values_grad(*expanded(table, v.dtype, cut, s, True), q, grad, grad_v, cut, s)
    grad_q = grad_q[0] if parts == 1 else grad_q.sum(0).to(q.dtype)
    return grad_q, grad_v, grad_table.to(table.dtype)


def _values_grad(e: Tensor, tiles: int, tile: int, q: Tensor, grad: Tensor, out: Tensor, cut: Cut, s: Sizes) -> None:
    groups = COLUMNS // s.channels
    grid = (tiles * triton.cdiv(s.map(cut)[0], groups), triton.cdiv(s.d, s.channels))
    values_grad[grid](
        e,
        q,
        grad,
        out,
        *s.map(cut),
        tiles,
        *q.stride()[:4],
        *grad.stride()[:4],
        BY=cut.block[0],
        **cut.constants(),
        **s.constants(),
        HP=_tile(s.heads),
        COLUMNS=e.shape[1],
        ROWS=tile,
        GROUPS=groups,
        QUERIES=max(1, s.step // s.depth),
        **s.launch,
    )


def _table_grad(q: Tensor, grad: Tensor, v: Tensor, out: Tensor, cut: Cut, s: Sizes) -> None:
    """Adds to `out`, (R1, R2, k, u) in float32."""
    columns = cut.keys * s.u
    places = max(1, ROWS // s.depth)
    groups, tile = max(1, s.step // s.channels), COLUMNS if columns > 192 else 64
    rows, tiles = triton.cdiv(cut.places, places), triton.cdiv(columns, tile)
    parts = triton.cdiv(s.d, s.channels)
    total = triton.cdiv(s.map(cut)[0], groups) * parts
    steps = triton.cdiv(total, min(total, triton.cdiv(PROGRAMS, rows * tiles)))
    splits = triton.cdiv(total, steps)
    made = q.new_empty(splits, cut.places, columns, s.depth, dtype=torch.float32)
    table_grad[(rows * tiles, splits)](
        q,
        grad,
        v,
        made,
        *s.map(cut),
        rows,
        # The interpreter of Triton 3.6 knows no ranges over an argument with NumPy 2.4.
        tl.constexpr(steps) if INTERPRETED else steps,
        *q.stride()[:4],
        *grad.stride()[:4],
        *v.stride()[:4],
        BY=cut.block[0],
        **cut.constants(),
        **s.constants(),
        HP=_tile(s.heads),
        PARTS=parts,
        PLACES=places,
        GROUPS=groups,
        TILE=tile,
        **s.launch,
    )
    fold[(out.shape[0] * out.shape[1], s.u)](
        made,
        out,
        splits,
        *out.shape[:2],
        *cut.start,
        **cut.constants(),
        K=s.k,
        KP=s.depth,
        U=s.u,
        BLOCK=64,
    )
