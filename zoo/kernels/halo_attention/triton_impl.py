"""How a call is cut and launched; see triton_kernels."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels.halo_attention import triton_kernels
from zoo.kernels.halo_attention.sizes import cut, power_of_2

LOG2E = math.log2(math.e)
# Bytes of the windows' gradients that are stored at once.
SCRATCH = 2**28
# Programs that keep every multiprocessor of a large GPU busy.
FULL = 1024


class Tuning(NamedTuple):
    """Keys of a tile, warps of a program, stages of its loop's loads, most registers of a thread.

    In backward also the blocks that a program runs through: it leaves one sum for the tables' gradients.
    """

    keys: int
    warps: int
    stages: int
    registers: int | None = None
    run: int = 1


def tuning(backward: bool, channels: int, queries: int, size: int, blocks: int = 0) -> Tuning:
    """For heads of at most `channels` channels of `size` bytes, tiles of so many queries and so many of them.

    The fastest on one H200 in bfloat16 of 18 (backward 8) combinations at the five layers of tools/bench; there is no
    search at run time, so that nothing is tuned again for a new batch or map.
    """
    keys = 32 if size == 4 or channels > 128 else 64
    warps = 8 if queries > 64 or channels > 64 else 4
    if backward:
        # Fewer, longer programs leave fewer sums for the tables, as long as they still fill the GPU several times.
        run = 4 if channels <= 32 and blocks >= 4 * FULL else 1
        return Tuning(32 if queries > 64 else keys, warps, 1, run=run)
    return Tuning(keys, warps, 3 if size == 2 and channels <= 64 else 2)


class Plan(NamedTuple):
    """How a block is cut; nothing of it depends on the batch or the map."""

    side: int
    window: int
    queries: int
    tiles: int
    columns: int
    table: int


def plan(block: int, halo: int, stride: int, channels: int) -> Plan:
    side, window = block // stride, block + 2 * halo
    tiles, queries = cut(side, channels)
    return Plan(side, window, queries, tiles, power_of_2(window), power_of_2(2 * window - 1))


def _rows(p: Plan, keys: int) -> int:
    """Rows of keys in a tile of about `keys`."""
    return max(1, min(keys // p.columns, power_of_2(p.window, 1)))


def _unit_stride(t: Tensor) -> Tensor:
    """`t` if the channels of a head lie side by side, as in channels-last maps; else a dense copy."""
    return t if t.stride(4) == 1 else t.contiguous()


def _precision(dtype: torch.dtype) -> str:
    # Three products of tf32 keep the digits of float32 on the tensor cores.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, Hq, Wq, heads, dv) dense in the dtype of v, lse float32 (programs, queries) in base 2."""
    batch, height, width, heads, dk = k.shape
    hq, wq, dv = q.shape[1], q.shape[2], v.shape[4]
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    p = plan(block, halo, stride, max(dk, dv))
    tuned = tuning(False, max(dk, dv), p.queries, q.element_size())
    blocks_y, blocks_x = triton.cdiv(height, block), triton.cdiv(width, block)
    programs = batch * blocks_y * blocks_x * p.tiles * heads
    out = v.new_empty(batch, hq, wq, heads, dv)
    lse = v.new_empty(programs, p.queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    rel = height_rel is not None
    with torch.cuda.device_of(q):
        triton_kernels.forward[(programs,)](
            q, k, v, height_rel.contiguous() if rel else q, width_rel.contiguous() if rel else q, out, lse,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
            height, width, hq, wq, blocks_y, blocks_x, heads, dk, dv, 0 if mask else halo,
            scale * LOG2E, (scale if scale_rel else 1.0) * LOG2E,
            POSITIONS=rel, BLOCK=block, HALO=halo, SIDE=p.side, WINDOW=p.window, QUERIES=p.queries, TILES=p.tiles,
            COLUMNS=p.columns, ROWS=_rows(p, tuned.keys), TABLE=p.table, DK=power_of_2(dk), DV=power_of_2(dv),
            PRECISION=_precision(q.dtype), STAGES=tuned.stages, num_warps=tuned.warps,
            maxnreg=tuned.registers,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both tables, dense; those of absent tables are empty."""
    batch, height, width, heads, dk = k.shape
    hq, wq, dv = q.shape[1], q.shape[2], v.shape[4]
    grad, q, k, v = _unit_stride(grad), _unit_stride(q), _unit_stride(k), _unit_stride(v)
    p = plan(block, halo, stride, max(dk, dv))
    blocks_y, blocks_x = triton.cdiv(height, block), triton.cdiv(width, block)
    rel, size = height_rel is not None, 2 * p.window - 1
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if grad.numel() == 0:
        none = [q.new_empty(0) if t is None else torch.zeros_like(t) for t in (height_rel, width_rel)]
        return d_q.zero_(), d_k.zero_(), d_v.zero_(), none[0], none[1]
    per_image = blocks_y * blocks_x * p.tiles
    of_image = per_image * heads * p.window**2 * (dk + dv) * k.element_size()
    images = max(1, min(batch, SCRATCH // of_image))
    tuned = tuning(True, max(dk, dv), p.queries, q.element_size(), images * per_image * heads)
    runs = triton.cdiv(images * per_image, tuned.run)
    parts = triton.cdiv(batch, images)
    k_windows = k.new_empty(images * per_image * heads * p.window**2, dk)
    v_windows = v.new_empty(images * per_image * heads * p.window**2, dv)
    d_tables = q.new_empty(parts, runs * heads, 2, size, dk if rel else 0, dtype=torch.float32)
    out = out.contiguous()
    tables = (height_rel.contiguous(), width_rel.contiguous()) if rel else (q, q)
    with torch.cuda.device_of(q):
        for part in range(parts):
            first, last = part * images, min(batch, (part + 1) * images)
            triton_kernels.backward[(runs * heads,)](
                grad, q, k, v, *tables, out, lse, d_q, k_windows, v_windows, d_tables[part],
                *grad.stride()[:4], *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
                height, width, hq, wq, blocks_y, blocks_x, heads, dk, dv, 0 if mask else halo,
                first * per_image, last * per_image, scale, scale if scale_rel else 1.0,
                POSITIONS=rel, BLOCK=block, HALO=halo, SIDE=p.side, WINDOW=p.window, QUERIES=p.queries, TILES=p.tiles,
                COLUMNS=p.columns, ROWS=_rows(p, tuned.keys), TABLE=p.table, DK=power_of_2(dk), DV=power_of_2(dv),
                RUN=tuned.run, PRECISION=_precision(q.dtype), STAGES=tuned.stages,
                num_warps=tuned.warps, maxnreg=tuned.registers,
            )  # fmt: skip
            for windows, d_map, d in ((k_windows, d_k, dk), (v_windows, d_v, dv)):
                places = max(1, 4096 // power_of_2(d) // 2)
                triton_kernels.fold[((last - first) * height, triton.cdiv(width * heads, places))](
                    windows, d_map, height, width, blocks_y, blocks_x, heads, d, first,
                    BLOCK=block, HALO=halo, WINDOW=p.window, TILES=p.tiles, PLACES=places, D=power_of_2(d),
                )  # fmt: skip
    if height_rel is None or width_rel is None:
        return d_q, d_k, d_v, q.new_empty(0), q.new_empty(0)
    d_height, d_width = (d_tables[:, :, axis].sum((0, 1)) for axis in (0, 1))
    return d_q, d_k, d_v, d_height.to(height_rel.dtype), d_width.to(width_rel.dtype)
