"""The public op."""

import torch
from torch import Tensor

from zoo.kernels.dispatch import Op, dispatch, register
from zoo.kernels.lambda_attention import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# `impl` is keyword-only by intent and not by signature: TorchScript takes no keyword-only arguments with defaults.
def lambda_attention(q: Tensor, v: Tensor, table: Tensor, impl: str = "auto") -> Tensor:
    """Position lambdas applied to queries: y[n, head] = sum over m and u of (q[n, head] . table[m - n, :, u]) v[m, u].

    m runs over the places of the map that the table reaches from n, R // 2 along each axis; the sum is not
    renormalised at borders. No (k x dv) lambda of a place is ever stored. The content lambda is not part of this.

    Args:
        q: (B, H, W, heads, k), any strides.
        v: (B, H, W, u, dv), any strides: u values of intra-depth, shared by the heads.
        table: (R1, R2, k, u), both odd; entry [R1 // 2 + dy, R2 // 2 + dx] belongs to the key dy below, dx to the
            right of its query. R = 2 * size - 1 reaches everywhere.
        impl: "auto", "reference" or "triton".

    Returns:
        (B, H, W, heads, dv) in the dtype of v.

    Raises:
        ValueError: sizes do not fit, or `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out.

    Source: Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", arXiv 2102.08602, section 3.
    """
    if torch.jit.is_scripting():
        check_sizes(q, v, table)
        if impl == "triton":
            raise RuntimeError("impl='triton' was asked for, but TorchScript takes the reference")
        return reference.lambda_attention(q, v, table)
    else:
        return _dispatched(q, v, table, impl)


def check_sizes(q: Tensor, v: Tensor, table: Tensor) -> None:
    """Raises ValueError where the sizes of a call do not belong together."""
    if q.dim() != 5 or v.dim() != 5 or table.dim() != 4:
        raise ValueError(
            f"lambda_attention: q {list(q.shape)}, v {list(v.shape)}, table {list(table.shape)}; they must have five, "
            "five and four sizes: (B, H, W, heads, k), (B, H, W, u, dv), (R1, R2, k, u)"
        )
    if q.shape[:3] != v.shape[:3]:
        raise ValueError(f"lambda_attention: q {list(q.shape)} and v {list(v.shape)} belong to different maps")
    if table.shape[0] % 2 == 0 or table.shape[1] % 2 == 0:
        raise ValueError(f"lambda_attention: the table has {list(table.shape)}; its first two sizes must be odd")
    if table.shape[2] != q.shape[4] or table.shape[3] != v.shape[3]:
        raise ValueError(
            f"lambda_attention: the table has {list(table.shape)}; its last two sizes must be key depth {q.shape[4]} "
            f"and intra-depth {v.shape[3]}"
        )


@torch.jit.unused
def _dispatched(q: Tensor, v: Tensor, table: Tensor, impl: str) -> Tensor:
    if isinstance(q, torch.fx.Proxy):
        # How the map is cut depends on its size, which symbolic tracing does not know: the op stays one node.
        return q.tracer.create_proxy("call_function", lambda_attention, (q, v, table, impl), {})  # type: ignore
    check_sizes(q, v, table)
    return dispatch(_ENTRY, impl, q, v, table)


def _triton(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return torch.ops.zoo.lambda_attention(q, v, table)


def _unsupported(q: Tensor, v: Tensor, table: Tensor) -> str | None:
    for name, tensor in (("q", q), ("v", v), ("the table", table)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, and the kernel takes float32, bfloat16 and float16"
        if tensor.device != q.device:
            return f"{name} is on {tensor.device} and q on {q.device}"
    if q.shape[3] > 16 or q.shape[4] > 64:
        return f"there are {q.shape[3]} heads of {q.shape[4]} channels, and the kernel takes up to 16 of up to 64"
    return None


@torch.library.custom_op("zoo::lambda_attention", mutates_args=(), device_types="cuda")
def _op(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    from zoo.kernels.lambda_attention import triton_impl

    return triton_impl.forward(q, v, table)


@_op.register_fake
def _fake(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:4], v.shape[4])


@torch.library.custom_op("zoo::lambda_attention_backward", mutates_args=(), device_types="cuda")
def _op_backward(grad: Tensor, q: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels.lambda_attention import triton_impl

    return triton_impl.backward(grad, q, v, table)


@_op_backward.register_fake
def _fake_backward(grad: Tensor, q: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), v.new_empty(v.shape), table.new_empty(table.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return torch.ops.zoo.lambda_attention_backward(grad, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup)

_ENTRY = register(Op("lambda_attention", reference.lambda_attention, _triton, _unsupported, auto_in_compile=True))
