"""The public op, and its registration with torch."""

import torch
from torch import Tensor

from zoo.kernels.context_broadcast import reference
from zoo.kernels.dispatch import Op, dispatch, register

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# `impl` is keyword-only by intent and not by signature: TorchScript takes no keyword-only arguments with defaults.
def context_broadcast(x: Tensor, scale: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Moves every token half way to the (scaled) mean token: (x + scale * mean_n(x)) / 2.

    Floor: x is read once and written once, 4 * B * N * C bytes in bf16 over the memory bandwidth; backward the same
    again. Sums are float32 in a fixed order: equal inputs give equal bits, gradients included.

    Args:
        x: tokens (B, N, C), any strides; float32, bfloat16, float16, and float64 in the reference alone.
        scale: (C,), any float dtype, on the device of x; None for 1.
        impl: "auto", "reference" or "triton".

    Returns:
        (B, N, C) in the dtype of x, under autocast too, as torch's own mean and addition.

    Raises:
        ValueError: `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out; or the shapes do not fit.

    Source: Hyeon-Woo et al., arXiv 2210.08457, equation 4.
    """
    if torch.jit.is_scripting():
        if impl == "triton":
            raise RuntimeError("impl='triton' was asked for, but TorchScript takes the reference")
        return reference.context_broadcast(x, scale)
    else:
        return _dispatched(x, scale, impl)


@torch.jit.unused
def _dispatched(x: Tensor, scale: Tensor | None, impl: str) -> Tensor:
    return dispatch(_ENTRY, impl, x, scale)


def _triton(x: Tensor, scale: Tensor | None) -> Tensor:
    return torch.ops.zoo.context_broadcast(x, scale)[0]


def _unsupported(x: Tensor, scale: Tensor | None = None) -> str | None:
    if x.ndim != 3:
        return f"x has {x.ndim} dimensions where (B, N, C) is needed"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, and the kernel takes float32, bfloat16 and float16"
    if scale is None:
        return None
    if scale.device != x.device:
        return f"scale is on {scale.device} and x on {x.device}"
    if scale.shape != x.shape[2:]:
        return f"scale has shape {tuple(scale.shape)} where ({x.shape[2]},) is needed"
    return None


@torch.library.custom_op("zoo::context_broadcast", mutates_args=(), device_types="cuda")
def _op(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    from zoo.kernels.context_broadcast import triton_impl

    return triton_impl.forward(x, scale)


@_op.register_fake
def _fake(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    return x.new_empty(batch, tokens, channels), x.new_empty(batch, channels, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    x, scale = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(scale, output[1] if scale is not None else None)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, grad_mean: Tensor | None):
    # The op is its own transpose in x. Both outputs have their gradient, so that a second derivative is right too.
    scale, mean = ctx.saved_tensors
    grad_x = grad_scale = None
    if grad is not None:
        grad_x, mean_of_grad = torch.ops.zoo.context_broadcast(grad, scale)
        if scale is not None and ctx.needs_input_grad[1]:
            grad_scale = ((mean * mean_of_grad).sum(dim=0) * (0.5 * ctx.shape[1])).to(scale.dtype)
    if grad_mean is not None:
        share = (grad_mean / ctx.shape[1])[:, None].expand(ctx.shape)
        grad_x = share.to(ctx.dtype) if grad_x is None else (grad_x + share).to(ctx.dtype)
    return grad_x, grad_scale


_op.register_autograd(_backward, setup_context=_setup)

_ENTRY = register(Op("context_broadcast", reference.context_broadcast, _triton, _unsupported))
