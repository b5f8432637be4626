"""Launches of the kernels, and which of cuDNN's is faster than ours."""

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from zoo.kernels.depthwise_conv2d import triton_kernels

# Outputs of a program are four rows of 256 numbers, eight a thread of one warp: what most shapes are fastest with.
ROWS, TILE = 4, 256
# Up to this side the gradient of weights is cuDNN's in 16 bit: in one sweep on an H200, of 128 images, ours took 1.2 to
# 1.7 times as long for 3 x 3 and 5 x 5, 2.9 times for 7 x 7, but a sixth of cuDNN's time for 9 x 9. In float32, where
# cuDNN may round to TF32, it is ours.
CUDNN_SIDE = 7
# Of the gradient of weights: sums that a thread keeps, rows of a program before it adds them up, and programs.
SUMS, STEPS, PROGRAMS = 27, 112, 400


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of images, rows, columns and channels."""
    return x.stride(0), x.stride(2), x.stride(3), x.stride(1)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_h: int,
    pad_w: int,
    flipped: bool,
    traced: bool = False,
) -> Tensor:
    """(B, C, H', W') channels-last, of any strides; `flipped` turns kernels by 180 degrees; `traced`: into a graph."""
    batch, channels, height, width = x.shape
    channels = int(channels)  # torch.compile may hold it open, and blocks depend on it
    kh, kw = weight.shape[2:]
    out_height, out_width = height + 2 * pad_h - kh + 1, width + 2 * pad_w - kw + 1
    out = x.new_empty(batch, out_height, out_width, channels)
    if out.numel() == 0:
        return out.permute(0, 3, 1, 2)
    sizes = (height, width, out_height, out_width, pad_h, pad_w)
    by_tap = x.new_empty(kh * kw, channels).copy_(weight.reshape(channels, kh * kw).t())
    block = 64 if channels % 64 == 0 else min(32, triton.next_power_of_2(channels))
    columns = TILE // block
    grid = (batch * triton.cdiv(out_height, ROWS) * triton.cdiv(out_width, columns), triton.cdiv(channels, block))
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        kernel = wrap_triton(triton_kernels.convolve) if traced else triton_kernels.convolve
        kernel[grid](
            x,
            by_tap,
            by_tap if bias is None else bias.contiguous(),
            out,
            *sizes,
            channels,
            *_strides(x),
            KH=kh,
            KW=kw,
            FLIPPED=flipped,
            BIAS=bias is not None,
            ROWS=ROWS,
            COLUMNS=columns,
            CHANNELS=block,
            num_warps=1,
        )
    return out.permute(0, 3, 1, 2)


def weights_grad(grad: Tensor, x: Tensor, weight: Tensor, pad_h: int, pad_w: int, traced: bool = False) -> Tensor:
    """The gradient of `weight`, of which shape and dtype count, for that of the output; any strides."""
    batch, channels, height, width = x.shape
    channels = int(channels)  # torch.compile may hold it open, and blocks depend on it
    out_height, out_width, (kh, kw) = grad.shape[2], grad.shape[3], weight.shape[2:]
    if grad.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if x.dtype != torch.float32 and max(kh, kw) <= CUDNN_SIDE:
        like, given = x.new_empty(weight.shape), (None, [1, 1], [pad_h, pad_w], [1, 1], False, [0, 0], channels)
        found = torch.ops.aten.convolution_backward(grad, x, like, *given, [False, True, False])[1]
        return found.contiguous().to(weight.dtype)
    sizes = (height, width, out_height, out_width, pad_h, pad_w)
    block = min(64, triton.next_power_of_2(channels))
    columns = 512 // block
    across = triton.cdiv(out_width, columns)
    passes = triton.cdiv(kw, max(1, SUMS // kh))
    taps = triton.cdiv(kw, passes)
    blocks = triton.cdiv(channels, block)
    images = max(1, min(STEPS // out_height, batch * across * blocks * passes // PROGRAMS))
    parts = triton.cdiv(batch, images) * across
    sums = x.new_empty(parts, kh * kw, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernel = wrap_triton(triton_kernels.weights_grad) if traced else triton_kernels.weights_grad
        kernel[(parts, blocks, passes)](
            grad,
            x,
            sums,
            batch,
            images,
            *sizes,
            channels,
            *_strides(grad),
            *_strides(x),
            KH=kh,
            KW=kw,
            TAPS=taps,
            COLUMNS=columns,
            CHANNELS=block,
            num_warps=8,
        )
    return sums.sum(dim=0).t().contiguous().view(weight.shape).to(weight.dtype)
