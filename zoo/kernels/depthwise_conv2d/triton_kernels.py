"""The kernels: a thread keeps a few rows of a column in registers, so that what it reads serves several outputs.

Tiles are (columns, channels), with channels contiguous in channels-last maps. Sums are float32 in a fixed order.
"""

# Triton knows tuples that grow, but no unpacking; and a condition over constants that is no expression.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl


# Neither batches nor maps of other sizes compile anything anew, as far as channels are divisible by 16.
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "pad_h", "pad_w"])
def convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    channels,
    x_b,
    x_h,
    x_w,
    x_c,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FLIPPED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS x COLUMNS x CHANNELS outputs of an image; weights are (KH * KW, channels)."""
    place = tl.program_id(0)
    across, down = tl.cdiv(out_width, COLUMNS), tl.cdiv(out_height, ROWS)
    column = (place % across) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    place = place // across
    row = (place % down) * ROWS
    image = (place // down).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = c < channels
    x_ptr += image * x_b + c * x_c
    # One address a column though all are equal: then weights lie in the threads that multiply with them.
    weight_ptr += c + tl.zeros([COLUMNS, 1], dtype=tl.int32)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([COLUMNS, CHANNELS], dtype=tl.float32),)
    for dx in range(KW):
        taps = ()
        for dy in tl.static_range(KH):
            tap = (KH - 1 - dy) * KW + KW - 1 - dx if FLIPPED else dy * KW + dx
            taps = taps + (tl.load(weight_ptr + tap * channels, mask=there, other=0.0).to(tl.float32),)
        at = column + dx - pad_w
        seen = there & (at >= 0) & (at < width)
        for r in tl.static_range(ROWS + KH - 1):
            y = row + r - pad_h
            x = tl.load(x_ptr + y * x_h + at * x_w, mask=seen & (y >= 0) & (y < height), other=0.0).to(tl.float32)
            added = ()
            for i in tl.static_range(ROWS):
                if r - i >= 0 and r - i < KH:
                    added = added + (sums[i] + x * taps[r - i],)
                else:
                    added = added + (sums[i],)
            sums = added
    out_ptr += image * out_height * out_width * channels + c
    for i in tl.static_range(ROWS):
        answer = sums[i]
        if BIAS:
            answer += tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)
        keep = there & (column < out_width) & (row + i < out_height)
        tl.store(out_ptr + ((row + i) * out_width + column) * channels, answer.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["batch", "images", "height", "width", "out_height", "out_width", "pad_h", "pad_w"])
def weights_grad(
    grad_ptr,
    x_ptr,
    parts_ptr,
    batch,
    images,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    channels,
    g_b,
    g_h,
    g_w,
    g_c,
    x_b,
    x_h,
    x_w,
    x_c,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What some images' COLUMNS add to the gradients of TAPS columns of the kernel.

    A row of the output's gradient stays in registers for the KH rows of x that it belongs to.
    """
    part = tl.program_id(0)
    across = tl.cdiv(out_width, COLUMNS)
    column = (part % across) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = tl.program_id(2) * TAPS
    there = c < channels
    kept = there & (column < out_width)
    sums = ()
    for _ in tl.static_range(KH * TAPS):
        sums = sums + (tl.zeros([COLUMNS, CHANNELS], dtype=tl.float32),)
    image = (part // across).to(tl.int64) * images
    end = tl.minimum(batch, image + images)
    while image < end:
        of_grad = grad_ptr + image * g_b + column * g_w + c * g_c
        of_x = x_ptr + image * x_b + c * x_c
        rows = ()
        for _ in tl.static_range(KH):
            rows = rows + (tl.zeros([COLUMNS, CHANNELS], dtype=tl.float32),)
        step = 0
        while step < out_height + KH - 1:
            row = tl.load(of_grad + step * g_h, mask=kept & (step < out_height), other=0.0).to(tl.float32)
            rows = (row,) + rows[: KH - 1]
            y = step - pad_h
            added = ()
            for t in tl.static_range(TAPS):
                at = column + first + t - pad_w
                seen = there & (at >= 0) & (at < width) & (y >= 0) & (y < height)
                x = tl.load(of_x + y * x_h + at * x_w, mask=seen, other=0.0).to(tl.float32)
                for dy in tl.static_range(KH):
                    added = added + (sums[t * KH + dy] + rows[dy] * x,)
            sums = added
            step += 1
        image += 1
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    parts_ptr += part.to(tl.int64) * (KH * KW) * channels + c
    for t in tl.static_range(TAPS):
        for dy in tl.static_range(KH):
            keep = (c < channels) & (first + t < KW)
            tl.store(parts_ptr + (dy * KW + first + t) * channels, tl.sum(sums[t * KH + dy], axis=0), mask=keep)
