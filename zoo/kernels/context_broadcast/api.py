"""The public op, and its registration with torch."""

import torch
from torch import Tensor

from zoo.kernels.context_broadcast import reference
from zoo.kernels.dispatch import use_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def context_broadcast(x: Tensor, scale: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Moves every token half way to the (scaled) mean token: (x + scale * mean_n(x)) / 2.

    Floor: x is read once and written once, 4 * B * N * C bytes in bf16 over the memory bandwidth.

    Args:
        x: tokens (B, N, C), any strides; float64 only in the reference.
        scale: (C,), any float dtype; None for 1.
        impl: "auto", "reference" or "triton".

    Returns:
        (B, N, C) in the dtype of x; sums are float32. Autocast leaves the dtype of x alone.

    Raises:
        ValueError: x is not (B, N, C), scale does not fit, or `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out.

    Source: Hyeon-Woo et al., arXiv 2210.08457, equation 4.
    """
    if torch.jit.is_scripting():
        return reference.context_broadcast(x, scale)
    else:
        return _dispatched(x, scale, impl)


@torch.jit.unused
def _dispatched(x: Tensor, scale: Tensor | None, impl: str) -> Tensor:
    if use_triton(impl, x, lambda: _unsupported(x, scale)):
        return torch.ops.zoo.context_broadcast(x, scale)[0]
    return reference.context_broadcast(x, scale)


def _unsupported(x: Tensor, scale: Tensor | None) -> str | None:
    if x.ndim != 3:
        return f"x has {x.ndim} dimensions where (B, N, C) is needed"
    if x.dtype not in _DTYPES:
        return f"its kernel takes float32, bfloat16 and float16, not {x.dtype}"
    if scale is not None and scale.device != x.device:
        return f"scale is on {scale.device} and x on {x.device}"
    return None


@torch.library.custom_op("zoo::context_broadcast", mutates_args=(), device_types="cuda")
def _op(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    from zoo.kernels.context_broadcast import triton_impl

    return triton_impl.forward(x, scale)


@_op.register_fake
def _fake(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(
        x.shape[0], x.shape[2], dtype=torch.float32
    )


def _setup(ctx, inputs, output) -> None:
    _, scale = inputs
    ctx.tokens = inputs[0].shape[1]
    ctx.save_for_backward(scale, output[1] if scale is not None else None)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None):
    # The op is its own transpose in x, up to which mean it takes.
    scale, mean = ctx.saved_tensors
    grad_x, grad_mean = torch.ops.zoo.context_broadcast(grad, scale)
    grad_scale = None
    if scale is not None and ctx.needs_input_grad[1]:
        grad_scale = ((mean * grad_mean).sum(dim=0) * (0.5 * ctx.tokens)).to(scale.dtype)
    return grad_x, grad_scale


_op.register_autograd(_backward, setup_context=_setup)
