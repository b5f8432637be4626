"""The public op, and its registration with torch."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from zoo.kernels.depthwise_conv2d import reference
from zoo.kernels.dispatch import Op, dispatch, register

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 17
# torch keeps compiled graphs on disk by what goes into them, of an op its name and arguments: this argument names the
# code that the graph takes in its place (_inlined), so that other code never finds a graph of this one.
_CODE = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("triton_impl.py", "triton_kernels.py"))
).hexdigest()[:16]
# From which side on "auto" takes the kernel, by the op's records of the bench: cuDNN takes 30 times as long for 9 x 9.
# Below, the kernel is faster from 5 x 5 on, for 3 x 3 with the gradient and level without; but an op of ours costs the
# host more than it saves, unless torch.compile writes it into its graph.
_LEAST, _LEAST_COMPILED = 9, 3


# `impl` is keyword-only by intent and not by signature: TorchScript takes no keyword-only arguments with defaults.
def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, impl: str = "auto"
) -> Tensor:
    """torch's conv2d with one kernel a channel: y_cij = b_c + sum_uv w_cuv x_c(i*stride+u-padding)(j*stride+v-padding).

    "auto" takes the kernel for channels-last maps of 32 channels and more in bfloat16 and float16, stride 1, sides of 9
    to 17 (inside torch.compile of 3 to 17), and else cuDNN by torch. Called for by name, the kernel takes all sides up
    to 17. It leaves the gradient of weights up to 7 x 7 in 16 bit to cuDNN. Its own sums are float32 in a fixed order.

    Floor: x is read once and y written once, 4 * B * C * H * W bytes in bf16 over the memory bandwidth; backward reads
    x and the gradient of y and writes one more, 6 * B * C * H * W.

    Args:
        x: (B, C, H, W), any strides. float32, bfloat16, float16, and float64 in the reference alone. Autocast leaves it
            as it is.
        weight: (C, 1, kh, kw), any float dtype; rounded to that of x.
        bias: (C,), any float dtype.
        stride: at least 1; more than 1 is the reference's alone.
        padding: rows and columns of zeros on every side, at least 0.
        impl: "auto", "reference" or "triton".

    Returns:
        (B, C, H', W') in the dtype of x, H' = (H + 2 * padding - kh) // stride + 1; channels-last if the kernel ran.

    Raises:
        ValueError: sizes do not fit, or `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out.

    Source: torch.nn.functional.conv2d with groups = C, which is the reference.
    """
    if torch.jit.is_scripting():
        if impl == "triton":
            raise RuntimeError("impl='triton' was asked for, but TorchScript takes the reference")
        return reference.depthwise_conv2d(x, weight, bias, stride, padding)
    else:
        return _dispatched(x, weight, bias, stride, padding, impl)


@torch.jit.unused
def _dispatched(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, impl: str) -> Tensor:
    if not isinstance(x, torch.fx.Proxy):
        check_sizes(x, weight, bias, stride, padding)
    return dispatch(_ENTRY, impl, x, weight, bias, stride, padding)


def check_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    """Raises ValueError where the arguments of a call do not belong together."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"depthwise_conv2d: x {list(x.shape)} of {x.dtype}; it must be (B, C, H, W) of floating point numbers"
        )
    if weight.dim() != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1 or 0 in weight.shape:
        raise ValueError(
            f"depthwise_conv2d: weight {list(weight.shape)}; for {x.shape[1]} channels it must be "
            f"[{x.shape[1]}, 1, kernel height, kernel width], none of them 0"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"depthwise_conv2d: bias {list(bias.shape)}; it must be [{x.shape[1]}], one a channel")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.device != x.device or not tensor.is_floating_point()):
            raise ValueError(
                f"depthwise_conv2d: {name} is {tensor.dtype} on {tensor.device}; it must be floating point on "
                f"{x.device}, as x is"
            )
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < least:
            raise ValueError(f"depthwise_conv2d: {name}={value!r}; it must be one integer of at least {least}")
    lacking = max(weight.shape[2] - x.shape[2], weight.shape[3] - x.shape[3]) - 2 * padding
    if lacking > 0:
        raise ValueError(
            f"depthwise_conv2d: kernels of {list(weight.shape[2:])} do not fit into maps of {list(x.shape[2:])} with "
            f"padding={padding}; take padding of at least {padding + (lacking + 1) // 2}, or smaller kernels"
        )


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    return torch.ops.zoo.depthwise_conv2d(x, weight, bias, padding, padding, False, _CODE)


def _unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> str | None:
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, and the kernel takes float32, bfloat16 and float16"
    if stride != 1:
        return f"stride={stride}, and the kernel takes 1"
    if max(weight.shape[2:]) > _LARGEST or padding >= min(weight.shape[2:]):
        return (
            f"kernels are {list(weight.shape[2:])} with padding={padding}, and the kernel takes sides up to {_LARGEST} "
            "and padding below them"
        )
    channels, height, width = x.shape[1:]
    span = 1 + sum((x.shape[axis] - 1) * x.stride(axis) for axis in (1, 2, 3))
    if max(span, channels * (height + 2 * padding) * (width + 2 * padding)) >= 2**31:
        return f"an image of {list(x.shape[1:])} spans {span} numbers of memory, and the kernel counts to 2**31"
    return None


def _slower(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> str | None:
    if x.dtype == torch.float32:
        return "cuDNN is left to float32, where the kernel was not measured"
    least = _LEAST_COMPILED if torch.compiler.is_compiling() else _LEAST
    if min(weight.shape[2:]) < least:
        return f"cuDNN is left to kernels below {least} x {least}, or below {_LEAST_COMPILED} inside torch.compile"
    if x.shape[1] < 32:
        return "cuDNN is left to fewer than 32 channels, where the kernel was not measured"
    if x.stride(1) != 1:
        return "the maps are not channels-last, and the kernel would turn them"
    return None


@torch.library.custom_op("zoo::depthwise_conv2d", mutates_args=(), device_types="cuda")
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, pad_h: int, pad_w: int, flipped: bool, code: str) -> Tensor:
    from zoo.kernels.depthwise_conv2d import triton_impl

    return triton_impl.forward(x, weight, bias, pad_h, pad_w, flipped)


@_op.register_fake
def _fake(x, weight, bias, pad_h, pad_w, flipped, code):
    batch, channels, height, width = x.shape
    size = (height + 2 * pad_h - weight.shape[2] + 1, width + 2 * pad_w - weight.shape[3] + 1)
    return x.new_empty(batch, *size, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("zoo::depthwise_conv2d_weights", mutates_args=(), device_types="cuda")
def _op_weights(grad: Tensor, x: Tensor, weight: Tensor, pad_h: int, pad_w: int) -> Tensor:
    from zoo.kernels.depthwise_conv2d import triton_impl

    return triton_impl.weights_grad(grad, x, weight, pad_h, pad_w)


@_op_weights.register_fake
def _fake_weights(grad, x, weight, pad_h, pad_w):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _transposed(grad: Tensor, weight: Tensor, pad_h: int, pad_w: int, flipped: bool) -> Tensor:
    """What the gradient of a convolution's output is to its input: convolved with the kernels turned around."""
    pad_h, pad_w = weight.shape[2] - 1 - pad_h, weight.shape[3] - 1 - pad_w
    return torch.ops.zoo.depthwise_conv2d(grad, weight, None, pad_h, pad_w, not flipped, _CODE)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.sizes, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    (x, weight), (pad_h, pad_w, flipped) = ctx.saved_tensors, ctx.sizes
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _transposed(grad, weight, pad_h, pad_w, flipped)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.zoo.depthwise_conv2d_weights(grad, x, weight, pad_h, pad_w)
        grad_weight = grad_weight.flip(2, 3) if flipped else grad_weight
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32).to(ctx.bias)
    return grad_x, grad_weight, grad_bias, None, None, None, None


def _setup_weights(ctx, inputs, output) -> None:
    grad, x, _, *ctx.sizes = inputs
    ctx.save_for_backward(grad, x)


def _backward_weights(ctx, grad_weight: Tensor):
    # The gradient of weights is a product of the output's gradient and x, so a second derivative has both again.
    (grad, x), (pad_h, pad_w) = ctx.saved_tensors, ctx.sizes
    of_grad = torch.ops.zoo.depthwise_conv2d(x, grad_weight, None, pad_h, pad_w, False, _CODE)
    return of_grad, _transposed(grad, grad_weight, pad_h, pad_w, False), None, None, None


_op.register_autograd(_backward, setup_context=_setup)
_op_weights.register_autograd(_backward_weights, setup_context=_setup_weights)


def _inlined(launch: str, takes: int):
    """What torch.compile traces instead of a registered op: its kernels, which the graph then launches by itself.

    An op that the compiler cannot look into costs the host 0.1 ms a call, longer than most of these kernels run.
    torch.library.triton_op does so too, but wants the kernels, and Triton with them, when zoo is imported.
    """

    def decompose(mode, op, types, args, kwargs):
        if not args[0].is_cuda:  # Triton's interpreter is no part of a graph
            return mode.__torch_dispatch__(op, types, args, kwargs)
        from zoo.kernels.depthwise_conv2d import triton_impl

        with mode:
            return getattr(triton_impl, launch)(*args[:takes], traced=True)

    return decompose


_op.register_torch_dispatch(FunctionalTensorMode, _inlined("forward", 6))
_op_weights.register_torch_dispatch(FunctionalTensorMode, _inlined("weights_grad", 5))

_ENTRY = register(
    Op("depthwise_conv2d", reference.depthwise_conv2d, _triton, _unsupported, slower=_slower, auto_in_compile=True)
)
