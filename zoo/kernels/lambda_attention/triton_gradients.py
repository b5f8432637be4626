"""The kernels of the way back: the gradient of a tile of lambdas, from queries and the answer's gradient, goes into a
matrix product as it is made. The names of sizes are those of triton_lambdas.py.
"""

import triton
import triton.language as tl

from zoo.kernels.lambda_attention.triton_lambdas import blocks


@triton.jit
def _outer(
    q_ptr,
    g_ptr,
    q_live,
    g_live,
    q_h,
    g_h,
    CHANNELS_FIRST: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    KP: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of lambdas, sum over heads of gradient x query, from pointers of A * B pairs of block and place.

    q_ptr (A * B, 1, KP) and g_ptr (A * B, 1, DP) show the first head; answers (A, DP, B, KP) as a matrix
    (A * DP, B * KP), or (A * KP, B * DP).
    """
    head = tl.arange(0, HP)[None, :, None]
    q = tl.load(q_ptr + head * q_h, mask=q_live & (head < HEADS), other=0.0)
    g = tl.load(g_ptr + head * g_h, mask=g_live & (head < HEADS), other=0.0)
    q = q.to(g.dtype)
    if CHANNELS_FIRST:
        out = tl.dot(tl.permute(g, [0, 2, 1]), q, input_precision=PRECISION).to(g.dtype)
        out = tl.permute(tl.reshape(out, [A, B, DP, KP]), [0, 2, 1, 3])
        return tl.reshape(out, [A * DP, B * KP])
    else:
        out = tl.dot(tl.permute(q, [0, 2, 1]), g, input_precision=PRECISION).to(g.dtype)
        out = tl.permute(tl.reshape(out, [A, B, KP, DP]), [0, 2, 1, 3])
        return tl.reshape(out, [A * KP, B * DP])


@triton.jit(do_not_specialize=["groups"])
def values_grad(
    e_ptr,
    q_ptr,
    g_ptr,
    out_ptr,
    groups,
    down,
    across,
    height,
    width,
    origin_y,
    window_y,
    window_x,
    row_tiles,
    q_b,
    q_y,
    q_x,
    q_h,
    g_b,
    g_y,
    g_x,
    g_h,
    P: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    N: tl.constexpr,
    WX: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of values: (channel, query of the window and k) times the transpose of `expand` BACKWARD."""
    first_row = tl.program_id(0) % row_tiles * ROWS
    first_group = tl.program_id(0) // row_tiles * GROUPS
    first_channel = tl.program_id(1) * DP
    row = first_row + tl.arange(0, ROWS)
    total = tl.zeros([GROUPS * DP, ROWS], dtype=tl.float32)
    # Pairs of a block and one of the queries of its window, the query running fastest.
    pair = tl.arange(0, GROUPS * QUERIES)[:, None, None]
    group = first_group + pair // QUERIES
    image, y, x = blocks(group, down, across, origin_y, BY, BX)
    y, x = y + window_y, x + window_x
    k = tl.arange(0, KP)[None, None, :]
    d = first_channel + tl.arange(0, DP)[None, None, :]
    q_ptr += image * q_b + k
    g_ptr += image * g_b + d
    for start in range(0, COLUMNS, QUERIES * KP):
        query = start // KP + pair % QUERIES
        query_y, query_x = y + query // WX, x + query % WX
        live = (query_y >= 0) & (query_y < height) & (query_x >= 0) & (query_x < width)
        live = live & (group < groups) & (query < N)
        lambdas = _outer(
            q_ptr + (query_y * q_y + query_x * q_x),
            g_ptr + (query_y * g_y + query_x * g_x),
            live & (k < K),
            live & (d < D),
            q_h,
            g_h,
            True,
            GROUPS,
            QUERIES,
            KP,
            DP,
            HEADS,
            HP,
            PRECISION,
        )
        column = start + tl.arange(0, QUERIES * KP)
        e = tl.load(e_ptr + row[:, None] * COLUMNS + column[None, :])
        total = tl.dot(lambdas, tl.trans(e), total, input_precision=PRECISION)

    channel = tl.arange(0, GROUPS * DP)
    group, channel = first_group + channel // DP, first_channel + channel % DP
    image, y, x = blocks(group, down, across, origin_y, BY, BX)
    place = row // U
    y, x = y[:, None] + (place // BX)[None, :], x[:, None] + (place % BX)[None, :]
    keep = ((group < groups) & (channel < D))[:, None] & (place < P)[None, :] & (y < height) & (x < width)
    out_ptr += ((image[:, None] * height + y) * width + x) * (U * D) + (row % U)[None, :] * D + channel[:, None]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["groups", "steps"])
def table_grad(
    q_ptr,
    g_ptr,
    v_ptr,
    out_ptr,
    groups,
    down,
    across,
    height,
    width,
    origin_y,
    window_y,
    window_x,
    row_tiles,
    steps,
    q_b,
    q_y,
    q_x,
    q_h,
    g_b,
    g_y,
    g_x,
    g_h,
    v_b,
    v_y,
    v_x,
    v_u,
    P: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    N: tl.constexpr,
    WX: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of what `expand` made, over `steps` times GROUPS blocks: (split, place, (key, u), k)."""
    first_place = tl.program_id(0) % row_tiles * PLACES
    column = tl.program_id(0) // row_tiles * TILE + tl.arange(0, TILE)
    key = column // U
    total = tl.zeros([PLACES * KP, TILE], dtype=tl.float32)
    # Pairs of a place and a block, the block running fastest.
    pair = tl.arange(0, PLACES * GROUPS)[:, None, None]
    place = first_place + pair // GROUPS
    k = tl.arange(0, KP)[None, None, :]
    d = tl.arange(0, DP)[None, None, :]
    channel = tl.arange(0, GROUPS * DP)
    for step in tl.range(0, steps):
        # Channels that do not fit one tile are further steps.
        step += tl.program_id(1) * steps
        first_group, first_channel = step // PARTS * GROUPS, step % PARTS * DP
        group = first_group + pair % GROUPS
        image, y, x = blocks(group, down, across, origin_y, BY, BX)
        y, x = y + place // BX, x + place % BX
        live = (group < groups) & (place < P) & (y < height) & (x < width)
        lambdas = _outer(
            q_ptr + (image * q_b + (y * q_y + x * q_x + k)),
            g_ptr + (image * g_b + (y * g_y + x * g_x + first_channel + d)),
            live & (k < K),
            live & (first_channel + d < D),
            q_h,
            g_h,
            False,
            PLACES,
            GROUPS,
            KP,
            DP,
            HEADS,
            HP,
            PRECISION,
        )
        group, part = first_group + channel // DP, first_channel + channel % DP
        image, y, x = blocks(group, down, across, origin_y, BY, BX)
        key_y, key_x = (y + window_y)[None, :] + (key // WX)[:, None], (x + window_x)[None, :] + (key % WX)[:, None]
        inside = (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
        inside = inside & (key < N)[:, None] & ((group < groups) & (part < D))[None, :]
        offset = key_y * v_y + key_x * v_x + (column % U * v_u)[:, None]
        v = tl.load(v_ptr + (image * v_b + part)[None, :] + offset, mask=inside, other=0.0)
        total = tl.dot(lambdas, tl.trans(v), total, input_precision=PRECISION)

    row = tl.arange(0, PLACES * KP)
    place = first_place + row // KP
    out_ptr += tl.program_id(1).to(tl.int64) * (P * N * U * KP)
    out_ptr += ((place * (N * U))[:, None] + column[None, :]) * KP + (row % KP)[:, None]
    tl.store(out_ptr, total, mask=(place < P)[:, None] & (column < N * U)[None, :])


@triton.jit(do_not_specialize=["splits"])
def fold(
    part_ptr,
    out_ptr,
    splits,
    rows_of_table,
    columns_of_table,
    window_y,
    window_x,
    P: tl.constexpr,
    BX: tl.constexpr,
    N: tl.constexpr,
    WX: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    U: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds one entry's gradient to the table's: the sum over splits and places of what `table_grad` made."""
    entry, u = tl.program_id(0), tl.program_id(1)
    dy = entry // columns_of_table - rows_of_table // 2
    dx = entry % columns_of_table - columns_of_table // 2
    k = tl.arange(0, KP)
    total = tl.zeros([BLOCK, KP], dtype=tl.float32)
    # No range over `splits`: the interpreter of Triton 3.6 fails at it with NumPy 2.4.
    start = 0
    while start < splits * P:
        index = start + tl.arange(0, BLOCK)
        place = index % P
        y, x = place // BX + dy - window_y, place % BX + dx - window_x
        live = (index < splits * P) & (y >= 0) & (y < N // WX) & (x >= 0) & (x < WX)
        offset = (index.to(tl.int64) * (N * U) + (y * WX + x) * U + u) * KP
        total += tl.load(part_ptr + offset[:, None] + k[None, :], mask=live[:, None], other=0.0)
        start += BLOCK
    out_ptr += (entry * K + k) * U + u
    tl.store(out_ptr, tl.load(out_ptr, mask=k < K) + tl.sum(total, axis=0), mask=k < K)
