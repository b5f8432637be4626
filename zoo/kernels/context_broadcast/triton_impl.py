"""One program an image and block of channels, with all its tokens in registers where they fit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Above this number of tokens a program sums in a loop and reads a second time, then from cache.
RESIDENT_TOKENS = 512
LOOP_BLOCK_N, BLOCK_C = 32, 64
# Elements of a block that a thread holds: 32 registers of pairs in bf16, 64 in float32, leaving room to work.
ELEMENTS_A_THREAD = 64


@triton.jit
def _broadcast(block, mean, y_ptr, rows, keep):
    out = (block.to(tl.float32) + mean[None, :]) * 0.5
    tl.store(y_ptr + rows, out.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _kernel(
    x_ptr,
    scale_ptr,
    y_ptr,
    mean_ptr,
    tokens,
    channels,
    stride_b,
    stride_n,
    stride_c,
    SCALED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    n = tl.arange(0, BLOCK_N)
    x_ptr += image * stride_b
    y_ptr += image * tokens * channels
    columns = c[None, :].to(tl.int64) * stride_c

    if RESIDENT:
        keep = (n[:, None] < tokens) & inside[None, :]
        block = tl.load(x_ptr + columns + n[:, None].to(tl.int64) * stride_n, mask=keep, other=0.0)
        total = tl.sum(block.to(tl.float32), axis=0)
    else:
        total = tl.zeros([BLOCK_C], dtype=tl.float32)
        # No range over `tokens`: the interpreter of Triton 3.6 fails at it with NumPy 2.4.
        start = 0
        while start < tokens:
            rows = (start + n)[:, None]
            keep = (rows < tokens) & inside[None, :]
            block = tl.load(x_ptr + columns + rows.to(tl.int64) * stride_n, mask=keep, other=0.0)
            total += tl.sum(block.to(tl.float32), axis=0)
            start += BLOCK_N

    mean = total / tokens
    tl.store(mean_ptr + image * channels + c, mean, mask=inside)
    if SCALED:
        mean *= tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float32)

    if RESIDENT:
        _broadcast(block, mean, y_ptr, n[:, None].to(tl.int64) * channels + c[None, :], keep)
    else:
        start = 0
        while start < tokens:
            rows = (start + n)[:, None]
            keep = (rows < tokens) & inside[None, :]
            block = tl.load(x_ptr + columns + rows.to(tl.int64) * stride_n, mask=keep, other=0.0)
            _broadcast(block, mean, y_ptr, rows.to(tl.int64) * channels + c[None, :], keep)
            start += BLOCK_N


def blocks(tokens: int) -> tuple[bool, int, int]:
    """(resident, tokens of a block, warps) for a number of tokens."""
    if tokens > RESIDENT_TOKENS:
        return False, LOOP_BLOCK_N, 4
    block_n = max(16, triton.next_power_of_2(tokens))
    return True, block_n, max(1, block_n * BLOCK_C // (32 * ELEMENTS_A_THREAD))


def forward(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, mean): y (B, N, C) contiguous in the dtype of x, mean over tokens float32 (B, C); any strides of x."""
    batch, tokens, channels = x.shape
    y = x.new_empty(batch, tokens, channels)
    mean = x.new_empty(batch, channels, dtype=torch.float32)
    if y.numel() == 0:
        return y, mean.zero_()
    resident, block_n, warps = blocks(tokens)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        _kernel[(batch, triton.cdiv(channels, BLOCK_C))](
            x,
            x if scale is None else scale.contiguous(),
            y,
            mean,
            tokens,
            channels,
            *x.stride(),
            SCALED=scale is not None,
            RESIDENT=resident,
            BLOCK_N=block_n,
            BLOCK_C=BLOCK_C,
            num_warps=warps,
        )
    return y, mean
