"""The public op, and its registration with torch."""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import Op, dispatch, register
from zoo.kernels.focused_linear_attention import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers of a tile's row, and of the sums, which a program has twice in its 227 KB of shared memory.
_WIDEST, _LARGEST, _LARGEST_FLOAT32 = 512, 2**15, 2**14


# `impl` is keyword-only by intent and not by signature: TorchScript takes no keyword-only arguments with defaults.
def focused_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    num_heads: int,
    power: int = 3,
    key_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y_n = sum_m w_nm v_m in every head, with w_nm = f(q_n) . f(k_m + position_m) / (1e-6 + mean over m) / N.

    f(x) = ||t|| t^power / ||t^power|| over all channels, for t = (relu(x) + 1e-6) / scale. The weights are never
    formed: f(k)^T v is summed first, one d x d matrix a head.

    Floor: q, k, v read once and y written once, 8 * B * N * C bytes in bf16 over the memory bandwidth; backward reads
    them and the gradient of y and writes three gradients, 14 * B * N * C. Sums are float32 in a fixed order.

    Args:
        q, k, v: (B, N, heads * d), heads outside; any strides. float32, bfloat16, float16, and float64 in the
            reference alone.
        positions: (1, N, heads * d), any float dtype; added to the keys.
        scale: (heads * d,), positive, any float dtype.
        num_heads: heads; divides the channels.
        power: at least 1; 1 is plain ReLU linear attention.
        key_mask: bool (B or 1, N), True where a key may be attended; the mean is over those. The reference's alone.
        impl: "auto", "reference" or "triton". In torch.compile "auto" leaves heads of more than 32 channels to the
            reference.

    Returns:
        (B, N, heads * d) in the dtype of v.

    Raises:
        ValueError: sizes do not fit, or `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out.

    Source: Han et al., "FLatten Transformer", arXiv 2308.00442, equations 4 to 6.
    """
    if torch.jit.is_scripting():
        check_sizes(q, k, v, positions, scale, num_heads, power)
        if impl == "triton":
            raise RuntimeError("impl='triton' was asked for, but TorchScript takes the reference")
        return reference.focused_linear_attention(q, k, v, positions, scale, num_heads, power, key_mask)
    else:
        return _dispatched(q, k, v, positions, scale, num_heads, power, key_mask, impl)


def check_sizes(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: Tensor, num_heads: int, power: int) -> None:
    """Raises ValueError where the sizes of a call do not belong together."""
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"focused_linear_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; they must have the "
            "same three sizes (B, N, heads * d)"
        )
    if num_heads < 1 or q.shape[2] % num_heads != 0:
        raise ValueError(f"focused_linear_attention: num_heads={num_heads} does not divide {q.shape[2]} channels")
    if positions.dim() != 3 or positions.shape[0] != 1 or positions.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"focused_linear_attention: positions {list(positions.shape)}; for {q.shape[1]} tokens of {q.shape[2]} "
            f"channels they must be [1, {q.shape[1]}, {q.shape[2]}]"
        )
    if scale.dim() != 1 or scale.shape[0] != q.shape[2]:
        raise ValueError(f"focused_linear_attention: scale {list(scale.shape)}; it must be [{q.shape[2]}], a channel")
    if power < 1:
        raise ValueError(f"focused_linear_attention: power={power}; it must be at least 1")


@torch.jit.unused
def _dispatched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    num_heads: int,
    power: int,
    key_mask: Tensor | None,
    impl: str,
) -> Tensor:
    if isinstance(q, torch.fx.Proxy):
        # Symbolic tracing knows no dtypes, which decide in which one the products run: the op stays one node.
        given = (q, k, v, positions, scale, num_heads, power, key_mask, impl)
        return q.tracer.create_proxy("call_function", focused_linear_attention, given, {})  # type: ignore
    check_sizes(q, k, v, positions, scale, num_heads, power)
    return dispatch(_ENTRY, impl, q, k, v, positions, scale, num_heads, power, key_mask)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    num_heads: int,
    power: int = 3,
    key_mask: Tensor | None = None,
) -> Tensor:
    return torch.ops.zoo.focused_linear_attention(q, k, v, positions, scale, num_heads, power)[0]


def _unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    num_heads: int,
    power: int = 3,
    key_mask: Tensor | None = None,
) -> str | None:
    if key_mask is not None:
        return "there is a key mask, which the kernel does not take"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("positions", positions), ("scale", scale)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, and the kernel takes float32, bfloat16 and float16"
        if tensor.device != q.device:
            return f"{name} is on {tensor.device} and q on {q.device}"
    heads, depth = _padded(num_heads, 1), _padded(q.shape[2] // num_heads, 16)
    largest = _LARGEST_FLOAT32 if v.dtype == torch.float32 else _LARGEST
    if heads * depth > _WIDEST or heads * depth * depth > largest:
        return (
            f"there are {num_heads} heads of {q.shape[2] // num_heads} channels, and with both rounded up to powers of "
            f"two the kernel takes up to {_WIDEST} channels and, in {v.dtype}, {largest} sums heads * d * d"
        )
    return None


def _slower(q: Tensor, _k: Any, _v: Any, _positions: Any, _scale: Any, num_heads: int, *_: Any) -> str | None:
    if torch.compiler.is_compiling() and q.shape[2] // num_heads > 32:
        return "compiled, it trains faster: backward of heads of more than 32 channels spills registers"
    return None


def _padded(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


@torch.library.custom_op("zoo::focused_linear_attention", mutates_args=(), device_types="cuda")
def _op(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: Tensor, num_heads: int, power: int
) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels.focused_linear_attention import triton_impl

    return triton_impl.forward(q, k, v, positions, scale, num_heads, power)


@_op.register_fake
def _fake(q, k, v, positions, scale, num_heads, power):
    batch, _, channels = q.shape
    depth = channels // num_heads
    sums = v.new_empty(batch, num_heads, depth, depth, dtype=torch.float32)
    return v.new_empty(v.shape), sums, v.new_empty(batch, channels, dtype=torch.float32)


@torch.library.custom_op("zoo::focused_linear_attention_backward", mutates_args=(), device_types="cuda")
def _op_backward(
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
    from zoo.kernels.focused_linear_attention import triton_impl

    return triton_impl.backward(grad, q, k, v, positions, scale, sums, mean, num_heads, power)


@_op_backward.register_fake
def _fake_backward(grad, q, k, v, positions, scale, sums, mean, num_heads, power):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, positions, scale))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.sizes = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, _grad_sums: Tensor | None, _grad_mean: Tensor | None):
    return *torch.ops.zoo.focused_linear_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None


_op.register_autograd(_backward, setup_context=_setup)

_ENTRY = register(
    Op(
        "focused_linear_attention",
        reference.focused_linear_attention,
        _triton,
        _unsupported,
        slower=_slower,
        auto_in_compile=True,
    )
)
