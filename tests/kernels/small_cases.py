"""A small case of every kernel, forward and backward, for what watches a process: python small_cases.py OP DEVICE."""

import sys

import torch

from zoo import kernels

# Shapes of tensors, and the constants after them. Odd maps, so that blocks lie partly beyond them.
CASES = {
    "context_broadcast": ([(2, 33, 65), (65,)], ()),
    "depthwise_conv2d": ([(2, 33, 7, 9), (33, 1, 9, 9), (33,)], (1, 4)),
    "focused_linear_attention": ([*[(2, 49, 96)] * 3, (1, 49, 96), (96,)], (3, 3, None)),
    "halo_attention": ([*[(2, 5, 7, 2, 16)] * 2, (2, 5, 7, 2, 32), *[(19, 16)] * 2], (4, 3, 0.25, 1, False, True)),
    "lambda_attention": ([(2, 5, 7, 2, 16), (2, 5, 7, 1, 32), (5, 5, 16, 1)], ()),
}


def arguments(op: str, device: str, dtype: torch.dtype) -> tuple:
    shapes, constants = CASES[op]
    # Positive, as a scale must be.
    given = [torch.rand(shape).add(0.1).to(device, dtype) for shape in shapes]
    if given[0].ndim == 4:
        given[0] = given[0].contiguous(memory_format=torch.channels_last)
    return (*(one.requires_grad_() for one in given), *constants)


def run(op: str, device: str, dtype: torch.dtype, impl: str) -> None:
    given = arguments(op, device, dtype)
    getattr(kernels, op)(*given, impl=impl).float().square().sum().backward()
    assert all(one.grad.isfinite().all() for one in given if isinstance(one, torch.Tensor))


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        run(sys.argv[1], sys.argv[2], dtype, "triton")
    print("ran", sys.argv[1])
