"""The kernels: one program an image and a run of tokens, with all heads of a tile in registers.

A tile is (heads, tokens, head_dim), padded to powers of two: the norms of a token run over all heads, and each product
is one a head. Sums over tokens are float32, one partial result a program, added up outside in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _across(x):
    """The sum over all channels of every token of a tile (heads, tokens, head_dim), as (1, tokens, 1)."""
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]


@triton.jit
def _focus(x, scale, channels, POWER: tl.constexpr):
    """t = (relu(x) + 1e-6) / scale as unit vector and norm, and so is unit ** POWER; channels that pad are zero."""
    t = tl.where(channels, (tl.maximum(x, 0.0) + 1e-6) / scale, 0.0)
    size = tl.sqrt(_across(t * t))
    unit = t / size
    raised = unit
    for _ in tl.static_range(POWER - 1):
        raised *= unit
    raised_size = tl.sqrt(_across(raised * raised))
    return unit, size, raised / raised_size, raised_size


@triton.jit
def _focus_grad(grad, x, scale, unit, size, focused, raised_size, POWER: tl.constexpr):
    """Gradients of x and scale (before the sum over tokens) from that of size * focused."""
    along = _across(grad * focused)
    slope = 1.0
    for _ in tl.static_range(POWER - 1):
        slope = slope * unit
    grad_t = unit * along + POWER * (slope / raised_size) * (grad - focused * along)
    return tl.where(x > 0, grad_t / scale, 0.0), -grad_t * unit * size / scale


@triton.jit
def _operand(x, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """An operand of a product, rounded where it is TF32: tensor cores cut the 13 last bits off, which is a bias."""
    x = x.to(WORK)
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the bits of a GPU's NaN would run over to those of zero
    return x


@triton.jit
def sum_keys(
    k_ptr,
    v_ptr,
    positions_ptr,
    scale_ptr,
    sums_ptr,
    mean_ptr,
    tokens,
    run,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over a run of tokens of focused keys times values, (heads, d, d), and of focused keys, both / tokens."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, HP)[:, None, None], tl.arange(0, DP)[None, None, :]
    channel, channels = head * D + d, (head < HEADS) & (d < D)
    scale = tl.load(scale_ptr + channel, mask=channels, other=1.0)
    k_ptr += image * k_b + channel * k_c
    v_ptr += image * v_b + channel * v_c
    sums = tl.zeros([HP, DP, DP], dtype=tl.float32)
    mean = tl.zeros([HP, DP], dtype=tl.float32)
    start, end = part * run, tl.minimum(tokens, part * run + run)
    while start < end:
        n = start + tl.arange(0, BLOCK)[None, :, None]
        live = channels & (n < end)
        x = tl.load(k_ptr + n.to(tl.int64) * k_n, mask=live, other=0.0).to(tl.float32)
        x += tl.load(positions_ptr + n * (HEADS * D) + channel, mask=live, other=0.0).to(tl.float32)
        _unit, size, focused, _raised_size = _focus(x, scale, channels, POWER)
        key = tl.where(live, size * focused, 0.0)
        value = tl.load(v_ptr + n.to(tl.int64) * v_n, mask=live, other=0.0)
        sums = tl.dot(
            tl.permute(_operand(key, WORK, PRECISION), [0, 2, 1]),
            _operand(value, WORK, PRECISION),
            sums,
            input_precision=PRECISION,
        )
        mean += tl.sum(key, axis=1)
        start += BLOCK
    place = image * tl.num_programs(1) + part
    row, column = tl.arange(0, DP)[None, :, None], tl.arange(0, DP)[None, None, :]
    keep = (head < HEADS) & (row < D) & (column < D)
    tl.store(sums_ptr + (place * (HEADS * D) + head * D + row) * D + column, sums / tokens, mask=keep)
    h, c = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    tl.store(mean_ptr + place * (HEADS * D) + h * D + c, mean / tokens, mask=(h < HEADS) & (c < D))


@triton.jit
def _sums(sums_ptr, mean_ptr, image, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Of an image: the sums (HP, DP, DP), and the mean key (HP, 1, DP)."""
    head = tl.arange(0, HP)[:, None, None]
    row, column = tl.arange(0, DP)[None, :, None], tl.arange(0, DP)[None, None, :]
    keep = (head < HEADS) & (row < D) & (column < D)
    sums = tl.load(sums_ptr + (image * (HEADS * D) + head * D + row) * D + column, mask=keep, other=0.0)
    keep = (head < HEADS) & (column < D)
    return sums, tl.load(mean_ptr + image * (HEADS * D) + head * D + column, mask=keep, other=0.0)


@triton.jit
def answer_queries(
    q_ptr,
    scale_ptr,
    sums_ptr,
    mean_ptr,
    out_ptr,
    tokens,
    run,
    q_b,
    q_n,
    q_c,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The answer of a run of tokens."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, HP)[:, None, None], tl.arange(0, DP)[None, None, :]
    channel, channels = head * D + d, (head < HEADS) & (d < D)
    scale = tl.load(scale_ptr + channel, mask=channels, other=1.0)
    sums, mean = _sums(sums_ptr, mean_ptr, image, HEADS, HP, D, DP)
    sums = _operand(sums, WORK, PRECISION)
    q_ptr += image * q_b + channel * q_c
    out_ptr += image * tokens * (HEADS * D) + channel
    start, end = part * run, tl.minimum(tokens, part * run + run)
    while start < end:
        n = start + tl.arange(0, BLOCK)[None, :, None]
        live = channels & (n < end)
        x = tl.load(q_ptr + n.to(tl.int64) * q_n, mask=live, other=0.0).to(tl.float32)
        _unit, size, focused, _raised_size = _focus(x, scale, channels, POWER)
        query = size * focused
        out = tl.dot(_operand(query, WORK, PRECISION), sums, input_precision=PRECISION)
        out /= tl.sum(query * mean, axis=2)[:, :, None] + 1e-6
        tl.store(out_ptr + n * (HEADS * D), out.to(out_ptr.dtype.element_ty), mask=live)
        start += BLOCK


@triton.jit
def queries_grad(
    grad_ptr,
    q_ptr,
    scale_ptr,
    sums_ptr,
    mean_ptr,
    grad_q_ptr,
    grad_sums_ptr,
    grad_mean_ptr,
    grad_scale_ptr,
    tokens,
    run,
    g_b,
    g_n,
    g_c,
    q_b,
    q_n,
    q_c,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a run of queries, and its part of those of the sums, of the mean key and of scale."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, HP)[:, None, None], tl.arange(0, DP)[None, None, :]
    channel, channels = head * D + d, (head < HEADS) & (d < D)
    scale = tl.load(scale_ptr + channel, mask=channels, other=1.0)
    sums, mean = _sums(sums_ptr, mean_ptr, image, HEADS, HP, D, DP)
    sums = _operand(sums, WORK, PRECISION)
    grad_ptr += image * g_b + channel * g_c
    q_ptr += image * q_b + channel * q_c
    grad_q_ptr += image * tokens * (HEADS * D) + channel
    grad_sums = tl.zeros([HP, DP, DP], dtype=tl.float32)
    grad_mean = tl.zeros([HP, DP], dtype=tl.float32)
    grad_scale = tl.zeros([HP, DP], dtype=tl.float32)
    start, end = part * run, tl.minimum(tokens, part * run + run)
    while start < end:
        n = start + tl.arange(0, BLOCK)[None, :, None]
        live = channels & (n < end)
        x = tl.load(q_ptr + n.to(tl.int64) * q_n, mask=live, other=0.0).to(tl.float32)
        unit, size, focused, raised_size = _focus(x, scale, channels, POWER)
        query = size * focused
        grad = tl.load(grad_ptr + n.to(tl.int64) * g_n, mask=live, other=0.0).to(tl.float32)
        normaliser = tl.sum(query * mean, axis=2)[:, :, None] + 1e-6
        worked = _operand(query, WORK, PRECISION)
        out = tl.dot(worked, sums, input_precision=PRECISION) / normaliser
        # Of the numerator and of the normaliser.
        grad /= normaliser
        grad_normaliser = -tl.sum(grad * out, axis=2)[:, :, None]
        of_out = _operand(grad, WORK, PRECISION)
        grad_sums = tl.dot(tl.permute(worked, [0, 2, 1]), of_out, grad_sums, input_precision=PRECISION)
        grad_mean += tl.sum(query * grad_normaliser, axis=1)
        grad = tl.dot(of_out, tl.permute(sums, [0, 2, 1]), input_precision=PRECISION) + grad_normaliser * mean
        grad, of_scale = _focus_grad(grad, x, scale, unit, size, focused, raised_size, POWER)
        grad_scale += tl.sum(tl.where(live, of_scale, 0.0), axis=1)
        tl.store(grad_q_ptr + n * (HEADS * D), grad.to(grad_q_ptr.dtype.element_ty), mask=live)
        start += BLOCK
    place = image * tl.num_programs(1) + part
    row, column = tl.arange(0, DP)[None, :, None], tl.arange(0, DP)[None, None, :]
    keep = (head < HEADS) & (row < D) & (column < D)
    tl.store(grad_sums_ptr + (place * (HEADS * D) + head * D + row) * D + column, grad_sums, mask=keep)
    h, c = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    keep = (h < HEADS) & (c < D)
    tl.store(grad_mean_ptr + place * (HEADS * D) + h * D + c, grad_mean, mask=keep)
    tl.store(grad_scale_ptr + place * (HEADS * D) + h * D + c, grad_scale, mask=keep)


@triton.jit
def keys_grad(
    k_ptr,
    v_ptr,
    positions_ptr,
    scale_ptr,
    grad_sums_ptr,
    grad_mean_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_scale_ptr,
    tokens,
    run,
    k_b,
    k_n,
    k_c,
    v_b,
    v_n,
    v_c,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a run of keys and values, and its part of that of scale."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, HP)[:, None, None], tl.arange(0, DP)[None, None, :]
    channel, channels = head * D + d, (head < HEADS) & (d < D)
    scale = tl.load(scale_ptr + channel, mask=channels, other=1.0)
    sums, mean = _sums(grad_sums_ptr, grad_mean_ptr, image, HEADS, HP, D, DP)
    sums = _operand(sums / tokens, WORK, PRECISION)
    mean /= tokens
    k_ptr += image * k_b + channel * k_c
    v_ptr += image * v_b + channel * v_c
    grad_k_ptr += image * tokens * (HEADS * D) + channel
    grad_v_ptr += image * tokens * (HEADS * D) + channel
    grad_scale = tl.zeros([HP, DP], dtype=tl.float32)
    start, end = part * run, tl.minimum(tokens, part * run + run)
    while start < end:
        n = start + tl.arange(0, BLOCK)[None, :, None]
        live = channels & (n < end)
        x = tl.load(k_ptr + n.to(tl.int64) * k_n, mask=live, other=0.0).to(tl.float32)
        x += tl.load(positions_ptr + n * (HEADS * D) + channel, mask=live, other=0.0).to(tl.float32)
        unit, size, focused, raised_size = _focus(x, scale, channels, POWER)
        grad = tl.dot(_operand(size * focused, WORK, PRECISION), sums, input_precision=PRECISION)
        tl.store(grad_v_ptr + n * (HEADS * D), grad.to(grad_v_ptr.dtype.element_ty), mask=live)
        value = tl.load(v_ptr + n.to(tl.int64) * v_n, mask=live, other=0.0)
        value = _operand(value, WORK, PRECISION)
        grad = tl.dot(value, tl.permute(sums, [0, 2, 1]), input_precision=PRECISION) + mean
        grad, of_scale = _focus_grad(grad, x, scale, unit, size, focused, raised_size, POWER)
        grad_scale += tl.sum(tl.where(live, of_scale, 0.0), axis=1)
        tl.store(grad_k_ptr + n * (HEADS * D), grad.to(grad_k_ptr.dtype.element_ty), mask=live)
        start += BLOCK
    place = image * tl.num_programs(1) + part
    h, c = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    tl.store(grad_scale_ptr + place * (HEADS * D) + h * D + c, grad_scale, mask=(h < HEADS) & (c < D))
