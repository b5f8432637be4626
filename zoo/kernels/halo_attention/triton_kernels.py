"""The kernels. One program an image, head and block of queries, over its window in tiles of whole rows of keys.

Logits are kept in base 2. Windows are never gathered: a program reads its keys from the maps, and the rows (columns) of
keys that take no part have a logit of NEVER in the part that depends on the row (column) alone. Backward recomputes
the weights from the stored log-sum-exp; each program writes the gradients of its own window's keys and values, which
`fold` then sums for every pixel in a fixed order: no atomics, equal inputs give equal bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
# Sizes that vary from call to call: none of them is worth a compilation of its own.
_SIZES = ["height", "width", "hq", "wq", "blocks_y", "blocks_x", "border", "first_block", "last_block", "first_image"]


def _compiled(function):
    sizes = [name for name in _SIZES if name in function.__code__.co_varnames]
    return triton.jit(function, do_not_specialize=sizes, do_not_specialize_on_alignment=["dtable_ptr"])


@triton.jit
def _place(n, tile, down, right, hq, wq, SIDE: tl.constexpr, QUERIES: tl.constexpr):
    """Of the queries of a block: (i, j) in it, (y, x) in the map, whether they are there."""
    place = tile * QUERIES + n
    i = place // SIDE
    j = place % SIDE
    y = down * SIDE + i
    x = right * SIDE + j
    return i, j, y, x, (i < SIDE) & (y < hq) & (x < wq)


@triton.jit
def _takes_part(first, u, size, border, WINDOW: tl.constexpr):
    """Which rows (columns) u of a window that begins at `first` take part."""
    return (u < WINDOW) & (first + u >= -border) & (first + u < size + border)


@triton.jit
def _relative(products, query, u, WINDOW: tl.constexpr, TABLE: tl.constexpr):
    """products (QUERIES, TABLE) -> (QUERIES, len(u)): of query row i and key row u, that with offset u - i."""
    index = u[None, :] - query[:, None] + (WINDOW - 1)
    return tl.gather(products, tl.minimum(tl.maximum(index, 0), TABLE - 1), 1)


@triton.jit
def _offsets(by_key, query, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr):
    """The transpose of `_relative`: (QUERIES, COLUMNS) -> (QUERIES, TABLE)."""
    u = tl.arange(0, TABLE)[None, :] + query[:, None] - (WINDOW - 1)
    values = tl.gather(by_key, tl.minimum(tl.maximum(u, 0), COLUMNS - 1), 1)
    return tl.where((u >= 0) & (u < WINDOW), values, 0.0)


@triton.jit
def _table(ptr, dk, dtype, WINDOW: tl.constexpr, TABLE: tl.constexpr, DK: tl.constexpr):
    """(DK, TABLE), one column an offset."""
    offset = tl.arange(0, TABLE)[None, :]
    d = tl.arange(0, DK)[:, None]
    return tl.load(ptr + offset * dk + d, mask=(offset < 2 * WINDOW - 1) & (d < dk), other=0.0).to(dtype)


@_compiled
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    down_ptr,
    right_ptr,
    out_ptr,
    lse_ptr,
    q_b, q_y, q_x, q_h,
    k_b, k_y, k_x, k_h,
    v_b, v_y, v_x, v_h,
    height, width, hq, wq, blocks_y, blocks_x, heads, dk, dv, border,
    scale,
    gain,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TABLE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    tile = pid // heads % TILES
    block_x = pid // heads // TILES % blocks_x
    block_y = pid // heads // TILES // blocks_x % blocks_y
    image = (pid // heads // TILES // blocks_x // blocks_y).to(tl.int64)
    n = tl.arange(0, QUERIES)
    i, j, y, x, there = _place(n, tile, block_y, block_x, hq, wq, SIDE, QUERIES)
    c = tl.arange(0, DK)
    cv = tl.arange(0, DV)
    q_at = y[:, None] * q_y + x[:, None] * q_x + c[None, :]
    q = tl.load(q_ptr + image * q_b + head * q_h + q_at, mask=there[:, None] & (c < dk)[None, :], other=0.0)
    first_y = block_y * BLOCK - HALO
    first_x = block_x * BLOCK - HALO
    columns = tl.arange(0, COLUMNS)
    part_x = _takes_part(first_x, columns, width, border, WINDOW)[None, :]
    if POSITIONS:
        by_row = tl.dot(q, _table(down_ptr, dk, q.dtype, WINDOW, TABLE, DK), input_precision=PRECISION) * gain
        by_column = tl.dot(q, _table(right_ptr, dk, q.dtype, WINDOW, TABLE, DK), input_precision=PRECISION) * gain
        right = tl.where(part_x, _relative(by_column, j, columns, WINDOW, TABLE), NEVER)
    else:
        right = tl.where(part_x, 0.0, NEVER)
    k_ptr += image * k_b + head * k_h
    v_ptr += image * v_b + head * v_h
    m = tl.arange(0, ROWS * COLUMNS)
    key_x = first_x + m % COLUMNS
    in_x = (m % COLUMNS < WINDOW) & (key_x >= 0) & (key_x < width)
    top = tl.full([QUERIES], -2.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DV], tl.float32)
    for start in tl.range(0, WINDOW, ROWS, num_stages=STAGES):
        u = start + m // COLUMNS
        key_y = first_y + u
        inside = (in_x & (u < WINDOW) & (key_y >= 0) & (key_y < height))[:, None]
        k_at = key_y[:, None] * k_y + key_x[:, None] * k_x + c[None, :]
        k = tl.load(k_ptr + k_at, mask=inside & (c < dk)[None, :], other=0.0)
        v_at = key_y[:, None] * v_y + key_x[:, None] * v_x + cv[None, :]
        v = tl.load(v_ptr + v_at, mask=inside & (cv < dv)[None, :], other=0.0)
        rows = start + tl.arange(0, ROWS)
        part_y = _takes_part(first_y, rows, height, border, WINDOW)[None, :]
        if POSITIONS:
            down = tl.where(part_y, _relative(by_row, i, rows, WINDOW, TABLE), NEVER)
        else:
            down = tl.where(part_y, 0.0, NEVER)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.reshape(s, [QUERIES, ROWS, COLUMNS]) * scale + (down[:, :, None] + right[:, None, :])
        s = tl.reshape(s, [QUERIES, ROWS * COLUMNS])
        best = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - best)
        p = tl.exp2(s - best[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = best
    # out and lse are dense: (B, Hq, Wq, heads, dv), (programs, QUERIES)
    at = ((y * wq + x) * heads + head)[:, None]
    keep = there[:, None] & (cv < dv)[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * hq * wq * heads * dv + at * dv + cv[None, :], out, mask=keep)
    tl.store(lse_ptr + pid.to(tl.int64) * QUERIES + n, top + tl.log2(total))


@_compiled
def backward(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    down_ptr,
    right_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dtable_ptr,
    g_b, g_y, g_x, g_h,
    q_b, q_y, q_x, q_h,
    k_b, k_y, k_x, k_h,
    v_b, v_y, v_x, v_h,
    height, width, hq, wq, blocks_y, blocks_x, heads, dk, dv, border, first_block, last_block,
    scale,
    gain,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TABLE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of `RUN` blocks: dq, the windows' dk and dv (blocks, heads, window, window, d), one sum for the tables."""
    head = tl.program_id(0) % heads
    n = tl.arange(0, QUERIES)
    c = tl.arange(0, DK)
    cv = tl.arange(0, DV)
    columns = tl.arange(0, COLUMNS)
    m = tl.arange(0, ROWS * COLUMNS)
    if POSITIONS:
        down_table = _table(down_ptr, dk, q_ptr.dtype.element_ty, WINDOW, TABLE, DK)
        right_table = _table(right_ptr, dk, q_ptr.dtype.element_ty, WINDOW, TABLE, DK)
        d_down_table = tl.zeros([TABLE, DK], tl.float32)
        d_right_table = tl.zeros([TABLE, DK], tl.float32)
    for step in range(RUN):
        # A block beyond the last one is the last one again, all masked.
        block = first_block + tl.program_id(0) // heads * RUN + step
        real = block < last_block
        block = tl.minimum(block, last_block - 1)
        tile = block % TILES
        block_x = block // TILES % blocks_x
        block_y = block // TILES // blocks_x % blocks_y
        image = (block // TILES // blocks_x // blocks_y).to(tl.int64)
        i, j, y, x, there = _place(n, tile, block_y, block_x, hq, wq, SIDE, QUERIES)
        there &= real
        keep = there[:, None] & (c < dk)[None, :]
        keep_v = there[:, None] & (cv < dv)[None, :]
        q_at = y[:, None] * q_y + x[:, None] * q_x + c[None, :]
        q = tl.load(q_ptr + image * q_b + head * q_h + q_at, mask=keep, other=0.0)
        g_at = y[:, None] * g_y + x[:, None] * g_x + cv[None, :]
        g = tl.load(grad_ptr + image * g_b + head * g_h + g_at, mask=keep_v, other=0.0)
        at = ((y * wq + x) * heads + head)[:, None]
        of_image = image * hq * wq * heads
        out = tl.load(out_ptr + of_image * dv + at * dv + cv[None, :], mask=keep_v, other=0.0)
        delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
        lse = tl.load(lse_ptr + (block.to(tl.int64) * heads + head) * QUERIES + n)
        first_y = block_y * BLOCK - HALO
        first_x = block_x * BLOCK - HALO
        part_x = _takes_part(first_x, columns, width, border, WINDOW)[None, :]
        if POSITIONS:
            by_row = tl.dot(q, down_table, input_precision=PRECISION) * (gain * LOG2E)
            by_column = tl.dot(q, right_table, input_precision=PRECISION) * (gain * LOG2E)
            right = tl.where(part_x, _relative(by_column, j, columns, WINDOW, TABLE), NEVER)
        else:
            right = tl.where(part_x, 0.0, NEVER)
        k_base = k_ptr + image * k_b + head * k_h
        v_base = v_ptr + image * v_b + head * v_h
        key_x = first_x + m % COLUMNS
        in_x = (m % COLUMNS < WINDOW) & (key_x >= 0) & (key_x < width)
        of_window = ((block - first_block).to(tl.int64) * heads + head) * (WINDOW * WINDOW)
        dq = tl.zeros([QUERIES, DK], tl.float32)
        d_down = tl.zeros([QUERIES, COLUMNS], tl.float32)
        d_right = tl.zeros([QUERIES, COLUMNS], tl.float32)
        for start in tl.range(0, WINDOW, ROWS, num_stages=STAGES):
            u = start + m // COLUMNS
            key_y = first_y + u
            inside = (in_x & (u < WINDOW) & (key_y >= 0) & (key_y < height))[:, None]
            k_at = key_y[:, None] * k_y + key_x[:, None] * k_x + c[None, :]
            k = tl.load(k_base + k_at, mask=inside & (c < dk)[None, :], other=0.0)
            v_at = key_y[:, None] * v_y + key_x[:, None] * v_x + cv[None, :]
            v = tl.load(v_base + v_at, mask=inside & (cv < dv)[None, :], other=0.0)
            rows = start + tl.arange(0, ROWS)
            part_y = _takes_part(first_y, rows, height, border, WINDOW)[None, :]
            if POSITIONS:
                down = tl.where(part_y, _relative(by_row, i, rows, WINDOW, TABLE), NEVER)
            else:
                down = tl.where(part_y, 0.0, NEVER)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.reshape(s, [QUERIES, ROWS, COLUMNS]) * (scale * LOG2E) + (down[:, :, None] + right[:, None, :])
            # What stands in for no query has none of the logits that lse sums: their ratio may be infinite.
            p = tl.where(there[:, None], tl.exp2(tl.reshape(s, [QUERIES, ROWS * COLUMNS]) - lse[:, None]), 0.0)
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            if POSITIONS:
                # In float32: these sums over a row or a column of keys may cancel.
                by_place = tl.reshape(ds, [QUERIES, ROWS, COLUMNS])
                d_right += tl.sum(by_place, 1)
                here = rows[None, :, None] == columns[None, None, :]
                d_down += tl.sum(tl.where(here, tl.sum(by_place, 2)[:, :, None], 0.0), 1)
            ds = ds.to(q.dtype)
            to = (u * WINDOW + m % COLUMNS)[:, None]
            dv_tile = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
            d_to = dv_ptr + of_window * dv + to * dv + cv[None, :]
            tl.store(d_to, dv_tile.to(dv_ptr.dtype.element_ty), mask=inside & (cv < dv)[None, :] & real)
            dk_tile = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
            d_to = dk_ptr + of_window * dk + to * dk + c[None, :]
            tl.store(d_to, dk_tile.to(dk_ptr.dtype.element_ty), mask=inside & (c < dk)[None, :] & real)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dq *= scale
        if POSITIONS:
            by_row = (_offsets(d_down, i, COLUMNS, WINDOW, TABLE) * gain).to(q.dtype)
            by_column = (_offsets(d_right, j, COLUMNS, WINDOW, TABLE) * gain).to(q.dtype)
            dq = tl.dot(by_row, tl.trans(down_table), dq, input_precision=PRECISION)
            dq = tl.dot(by_column, tl.trans(right_table), dq, input_precision=PRECISION)
            d_down_table = tl.dot(tl.trans(by_row), q, d_down_table, input_precision=PRECISION)
            d_right_table = tl.dot(tl.trans(by_column), q, d_right_table, input_precision=PRECISION)
        tl.store(dq_ptr + of_image * dk + at * dk + c[None, :], dq.to(dq_ptr.dtype.element_ty), mask=keep)
    if POSITIONS:
        offset = tl.arange(0, TABLE)[:, None]
        size = 2 * WINDOW - 1
        part = dtable_ptr + tl.program_id(0).to(tl.int64) * (2 * size * dk) + offset * dk + c[None, :]
        keep = (offset < size) & (c < dk)[None, :]
        tl.store(part, d_down_table, mask=keep)
        tl.store(part + size * dk, d_right_table, mask=keep)


@_compiled
def fold(
    windows_ptr,
    out_ptr,
    height, width, blocks_y, blocks_x, heads, d, first_image,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    WINDOW: tl.constexpr,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Sums what the windows hold of each pixel: a row of pixels and their heads, PLACES at once."""
    image = (tl.program_id(0) // height).to(tl.int64)
    y = tl.program_id(0) % height
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    x = place // heads
    head = place % heads
    c = tl.arange(0, D)[None, :]
    acc = tl.zeros([PLACES, D], tl.float32)
    reach: tl.constexpr = (HALO + BLOCK - 1) // BLOCK
    for a in tl.static_range(-reach, reach + 1):
        block_y = y // BLOCK + a
        u = y - block_y * BLOCK + HALO
        for b in tl.static_range(-reach, reach + 1):
            block_x = x // BLOCK + b
            v = x - block_x * BLOCK + HALO
            there = (x < width) & (block_x >= 0) & (block_x < blocks_x) & (v >= 0) & (v < WINDOW)
            there &= (block_y >= 0) & (block_y < blocks_y) & (u >= 0) & (u < WINDOW)
            for tile in tl.static_range(TILES):
                window = (((image * blocks_y + block_y) * blocks_x + block_x) * TILES + tile) * heads + head
                at = ((window * WINDOW + u) * WINDOW + v)[:, None] * d + c
                acc += tl.load(windows_ptr + at, mask=there[:, None] & (c < d), other=0.0).to(tl.float32)
    at = (((first_image + image) * height + y) * width * heads + place)[:, None] * d + c
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(x < width)[:, None] & (c < d))
