"""The kernels: position lambdas as matrix products whose tiles never leave the chip.

A map is cut into blocks; each block has a window of the places around it. Seen from a block, the table is one matrix
for all blocks of all images, so that position lambdas are (block place, k) x window times window x (block, channel of
v): dense products with no skew between offsets and places. A tile of lambdas is contracted with its queries in
registers; triton_gradients.py holds the rest of the way back.

Sizes in capitals are compile-time constants: P places of a block of rows BX wide; N places of a window of rows WX
wide; U values of a place; HEADS; K depth of a key, padded to KP; D channels of v, padded to DP a tile. What depends on
the batch is no constant and specialises nothing: a new batch size compiles no kernel.
"""

import triton
import triton.language as tl


@triton.jit
def expand(
    table_ptr,
    out_ptr,
    stride_y,
    stride_x,
    stride_k,
    stride_u,
    rows_of_table,
    columns_of_table,
    window_y,
    window_x,
    BACKWARD: tl.constexpr,
    P: tl.constexpr,
    BX: tl.constexpr,
    N: tl.constexpr,
    WX: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    U: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The table as a matrix: rows (query of the block, k), columns (key of the window, u); zero beyond its reach.

    BACKWARD: rows (key of the block, u), columns (query of the window, k).
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if BACKWARD:
        place, k, other, u = row // U, column % KP, column // KP, row % U
    else:
        place, k, other, u = row // KP, row % KP, column // U, column % U
    dy = other // WX + window_y - place // BX
    dx = other % WX + window_x - place % BX
    if BACKWARD:
        dy, dx = -dy, -dx
    y, x = dy + rows_of_table // 2, dx + columns_of_table // 2
    live = (place < P) & (other < N) & (k < K)
    live = live & (y >= 0) & (y < rows_of_table) & (x >= 0) & (x < columns_of_table)
    entry = tl.load(table_ptr + y * stride_y + x * stride_x + k * stride_k + u * stride_u, mask=live, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * COLUMNS + column, entry.to(out_ptr.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def blocks(group, down, across, origin_y, BY: tl.constexpr, BX: tl.constexpr):
    """(image, y, x) of the first place of a block, blocks being counted over images, down and across."""
    y = origin_y + (group // across) % down * BY
    return (group // (across * down)).to(tl.int64), y, group % across * BX


@triton.jit(do_not_specialize=["groups"])
def apply(
    e_ptr,
    v_ptr,
    factor_ptr,
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
    v_b,
    v_y,
    v_x,
    v_u,
    f_b,
    f_y,
    f_x,
    f_h,
    out_part,
    ANSWER: tl.constexpr,
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
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of lambdas, contracted over k with queries (ANSWER) or over channels with gradients of the answer."""
    first_place = tl.program_id(0) % row_tiles * PLACES
    first_group = tl.program_id(0) // row_tiles * GROUPS
    first_channel = tl.program_id(1) * DP
    row = first_place * KP + tl.arange(0, PLACES * KP)
    channel = tl.arange(0, GROUPS * DP)
    group, channel = first_group + channel // DP, first_channel + channel % DP
    image, y, x = blocks(group, down, across, origin_y, BY, BX)
    y, x = y + window_y, x + window_x
    live = (group < groups) & (channel < D)
    v_ptr += (image * v_b + channel)[None, :]

    if ANSWER:
        lambdas = tl.zeros([GROUPS * DP, PLACES * KP], dtype=tl.float32)
    else:
        lambdas = tl.zeros([PLACES * KP, GROUPS * DP], dtype=tl.float32)
    for start in range(0, COLUMNS, STEP):
        column = start + tl.arange(0, STEP)
        key = column // U
        key_y, key_x = (key // WX)[:, None] + y[None, :], (key % WX)[:, None] + x[None, :]
        inside = (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
        inside = inside & (key < N)[:, None] & live[None, :]
        v = tl.load(v_ptr + (key_y * v_y + key_x * v_x + (column % U * v_u)[:, None]), mask=inside, other=0.0)
        e = tl.load(e_ptr + row[:, None] * COLUMNS + column[None, :])
        if ANSWER:
            lambdas = tl.dot(tl.trans(v), tl.trans(e), lambdas, input_precision=PRECISION)
        else:
            lambdas = tl.dot(e, v, lambdas, input_precision=PRECISION)

    # Dimensions are (block, channel, place, k) for the answer, (place, k, block, channel) for its transpose.
    if ANSWER:
        lambdas = tl.reshape(lambdas, [GROUPS, DP, PLACES, KP])
        group = (first_group + tl.arange(0, GROUPS))[:, None, None, None]
        channel = (first_channel + tl.arange(0, DP))[None, :, None, None]
        place = (first_place + tl.arange(0, PLACES))[None, None, :, None]
        k = tl.arange(0, KP)[None, None, None, :]
        inner, size = k, K
    else:
        lambdas = tl.reshape(lambdas, [PLACES, KP, GROUPS, DP])
        place = (first_place + tl.arange(0, PLACES))[:, None, None, None]
        k = tl.arange(0, KP)[None, :, None, None]
        group = (first_group + tl.arange(0, GROUPS))[None, None, :, None]
        channel = (first_channel + tl.arange(0, DP))[None, None, None, :]
        inner, size = channel, D
    image, y, x = blocks(group, down, across, origin_y, BY, BX)
    y, x = y + place // BX, x + place % BX
    live = (group < groups) & (place < P) & (y < height) & (x < width)
    f_ptr = factor_ptr + (image * f_b + (y * f_y + x * f_x + inner))
    if ANSWER:
        outer, kept = channel, D
    else:
        outer, kept = k, K
        out_ptr += tl.program_id(1) * out_part
    o_ptr = out_ptr + (((image * height + y) * width + x) * (HEADS * kept) + outer)
    o_ptr = tl.reshape(o_ptr, [o_ptr.shape[0], o_ptr.shape[1], o_ptr.shape[2]])
    keep = live & (outer < kept)
    keep = tl.reshape(keep, [keep.shape[0], keep.shape[1], keep.shape[2]])
    for head in tl.static_range(HEADS):
        factor = tl.load(f_ptr + head * f_h, mask=live & (inner < size), other=0.0).to(tl.float32)
        out = tl.sum(lambdas * factor, axis=3)
        tl.store(o_ptr + head * kept, out.to(out_ptr.dtype.element_ty), mask=keep)
