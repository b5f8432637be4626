"""Launches of the kernels: keys and values first, then queries, and the same two ways back."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.focused_linear_attention import triton_kernels

# Tokens of one program: so many that its sums, which it writes once, are a small part of what it reads.
RUN = 512
# Numbers of a tile, of which a thread of eight warps then holds sixteen, and the fewest tokens of a product.
TILE, FEWEST = 4096, 16


def constants(q: Tensor, v: Tensor, num_heads: int, power: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    depth = q.shape[2] // num_heads
    heads, padded = triton.next_power_of_2(num_heads), max(16, triton.next_power_of_2(depth))
    block = min(64, max(FEWEST, TILE // (heads * padded)))
    # In float16 the products would leave its range: they have three bits more than it in TF32's, and the range.
    work = tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32
    precision = "tf32" if v.dtype == torch.float16 else "tf32x3"
    sizes = {"HEADS": num_heads, "HP": heads, "D": depth, "DP": padded, "BLOCK": block, "POWER": power}
    return sizes | {"WORK": work, "PRECISION": precision, "num_warps": 8}


def forward(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: Tensor, num_heads: int, power: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(answer (B, N, C) contiguous, sums float32 (B, heads, d, d), mean key float32 (B, C)); any strides."""
    batch, tokens, channels = q.shape
    depth = channels // num_heads
    out = v.new_empty(batch, tokens, channels)
    if out.numel() == 0:
        sums = out.new_empty(batch, num_heads, depth, depth, dtype=torch.float32)
        return out, sums.zero_(), out.new_empty(batch, channels, dtype=torch.float32).zero_()
    runs = triton.cdiv(tokens, RUN)
    sums = out.new_empty(batch, runs, num_heads, depth, depth, dtype=torch.float32)
    mean = out.new_empty(batch, runs, channels, dtype=torch.float32)
    fixed = constants(q, v, num_heads, power)
    positions, scale = positions.contiguous(), scale.float().contiguous()
    # Triton launches on the current device, which need not be that of q.
    with torch.cuda.device_of(q):
        triton_kernels.sum_keys[(batch, runs)](
            k, v, positions, scale, sums, mean, tokens, RUN, *k.stride(), *v.stride(), **fixed
        )
        sums, mean = sums.sum(dim=1), mean.sum(dim=1)
        triton_kernels.answer_queries[(batch, runs)](q, scale, sums, mean, out, tokens, RUN, *q.stride(), **fixed)
    return out, sums, mean


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    sums: Tensor,
    mean: Tensor,
    num_heads: int,
    power: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, positions and scale, contiguous and in their dtypes; any strides."""
    batch, tokens, channels = q.shape
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if grad_q.numel() == 0:
        return grad_q, grad_k, grad_v, torch.zeros_like(positions), torch.zeros_like(scale)
    runs = triton.cdiv(tokens, RUN)
    grad_sums = mean.new_empty(batch, runs, *sums.shape[1:])
    grad_mean = mean.new_empty(batch, runs, channels)
    grad_scale = mean.new_empty(2, batch, runs, channels)
    fixed = constants(q, v, num_heads, power)
    tables, stretch = positions.contiguous(), scale.float().contiguous()
    with torch.cuda.device_of(q):
        triton_kernels.queries_grad[(batch, runs)](
            grad,
            q,
            stretch,
            sums,
            mean,
            grad_q,
            grad_sums,
            grad_mean,
            grad_scale[0],
            tokens,
            RUN,
            *grad.stride(),
            *q.stride(),
            **fixed,
        )
        grad_sums, grad_mean = grad_sums.sum(dim=1), grad_mean.sum(dim=1)
        triton_kernels.keys_grad[(batch, runs)](
            k,
            v,
            tables,
            stretch,
            grad_sums,
            grad_mean,
            grad_k,
            grad_v,
            grad_scale[1],
            tokens,
            RUN,
            *k.stride(),
            *v.stride(),
            **fixed,
        )
    # A position is added to the same token's key of every image.
    grad_positions = grad_k.sum(dim=0, keepdim=True, dtype=torch.float32).to(positions.dtype)
    return grad_q, grad_k, grad_v, grad_positions, grad_scale.sum(dim=(0, 1, 2)).to(scale.dtype)
