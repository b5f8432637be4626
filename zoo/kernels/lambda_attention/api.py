"""The public op."""

import torch
from torch import Tensor

from zoo.kernels.dispatch import Op, dispatch, register
from zoo.kernels.lambda_attention import reference


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
    raise RuntimeError(_unsupported(q, v, table))


def _unsupported(q: Tensor, v: Tensor, table: Tensor) -> str | None:
    return "there is no kernel yet"


_ENTRY = register(Op("lambda_attention", reference.lambda_attention, _triton, _unsupported, auto_in_compile=True))
