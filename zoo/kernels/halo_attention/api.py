"""The public op."""

import torch
from torch import Tensor

from zoo.kernels.dispatch import Op, dispatch, register
from zoo.kernels.halo_attention import reference
from zoo.kernels.halo_attention.sizes import cut

# The most channels of keys and of values in a head: a program's tiles have to fit into shared memory.
_WIDEST = {torch.float32: (64, 128), torch.bfloat16: (128, 256), torch.float16: (128, 256)}


# `impl` is keyword-only by intent and not by signature: TorchScript takes no keyword-only arguments with defaults.
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    scale: float,
    stride: int = 1,
    scale_rel: bool = False,
    mask: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of each block of queries to the block's keys and the halo around them.

    Logit of query (i, j) of a block, counted from the block's corner in queries, and key (u, v) of its window, counted
    from the window's corner, w = block + 2 * halo keys wide, `halo` before the block:
    scale * q.k + s * (q . width_rel[v - j + w - 1] + q . height_rel[u - i + w - 1]), s = scale if `scale_rel` else 1.

    Args:
        q: (B, Hq, Wq, heads, dk), any strides; Hq = ceil(H / stride), Wq = ceil(W / stride).
        k: (B, H, W, heads, dk), any strides.
        v: (B, H, W, heads, dv), any strides.
        height_rel, width_rel: (2 * w - 1, dk), shared by the heads; or None for both. The kernel rounds them to the
            dtype of q.
        block: side of a block of keys; the last blocks may lie partly beyond the map.
        halo: keys around a block that its queries see too.
        scale: of the dot product.
        stride: every stride-th query, `block` must be a multiple of it.
        scale_rel: whether the positions are scaled too.
        mask: whether only keys inside the map take part. False: the map has a border of zero keys and values, `halo`
            wide, that takes part; keys beyond that border never do.
        impl: "auto", "reference" or "triton".

    Returns:
        (B, Hq, Wq, heads, dv) in the dtype of v.

    Raises:
        ValueError: sizes do not fit, or `impl` is unknown.
        RuntimeError: `impl` is "triton" and something rules it out.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.
    """
    if torch.jit.is_scripting():
        check_sizes(q, k, v, height_rel, width_rel, block, halo, stride)
        if impl == "triton":
            raise RuntimeError("impl='triton' was asked for, but TorchScript takes the reference")
        return reference.halo_attention(q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask)
    else:
        return _dispatched(q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask, impl)


def check_sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    stride: int,
) -> None:
    """Raises ValueError where the sizes of a call do not belong together."""
    if block < 1 or halo < 0 or stride < 1 or block % stride:
        raise ValueError(f"halo_attention: block={block}, halo={halo}, stride={stride}: stride must divide block")
    if q.dim() != 5 or k.dim() != 5 or v.dim() != 5:
        raise ValueError(
            f"halo_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
            "each must have five sizes: images, rows, columns, heads, channels"
        )
    rows, columns = -(-k.shape[1] // stride), -(-k.shape[2] // stride)
    if q.shape[1] != rows or q.shape[2] != columns:
        raise ValueError(
            f"halo_attention: {q.shape[1]} x {q.shape[2]} queries for {k.shape[1]} x {k.shape[2]} keys; "
            f"with stride={stride} there must be {rows} x {columns}"
        )
    if k.shape[:4] != v.shape[:4] or q.shape[0] != k.shape[0] or q.shape[3:] != k.shape[3:]:
        raise ValueError(f"halo_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit")
    if (height_rel is None) != (width_rel is None):
        raise ValueError("halo_attention: give both height_rel and width_rel, or neither")
    size = 2 * (block + 2 * halo) - 1
    if height_rel is not None and width_rel is not None:
        want = [size, k.shape[4]]
        if list(height_rel.shape) != want or list(width_rel.shape) != want:
            raise ValueError(
                f"halo_attention: tables {list(height_rel.shape)} and {list(width_rel.shape)} where block={block} and "
                f"halo={halo} need {want}"
            )


@torch.jit.unused
def _dispatched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
    mask: bool,
    impl: str,
) -> Tensor:
    if isinstance(q, torch.fx.Proxy):
        # How the map is cut depends on its size, which symbolic tracing does not know: the op stays one node.
        arguments = (q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask, impl)
        return q.tracer.create_proxy("call_function", halo_attention, arguments, {})  # type: ignore[return-value]
    check_sizes(q, k, v, height_rel, width_rel, block, halo, stride)
    return dispatch(_ENTRY, impl, q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask)


def _triton(*arguments) -> Tensor:
    return torch.ops.zoo.halo_attention(*arguments)[0]


def _unsupported(
    q, k, v, height_rel, width_rel, block, halo, scale, stride=1, scale_rel=False, mask=True
) -> str | None:
    if q.dtype not in _WIDEST or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernel takes one of float32, bfloat16, float16"
    widest = _WIDEST[q.dtype]
    if q.shape[4] > widest[0] or v.shape[4] > widest[1]:
        return f"heads have {q.shape[4]} and {v.shape[4]} channels; in {q.dtype} the kernel takes {widest} at most"
    if block + 2 * halo > 32:
        return f"windows are {block + 2 * halo} keys wide, and the kernel takes 32 at most"
    if halo > block:
        return f"halo={halo} is wider than block={block}, for which the kernel compiles from 14 seconds to minutes"
    tensors = [q, k, v] if height_rel is None else [q, k, v, height_rel, width_rel]
    if any(t.device != q.device for t in tensors):
        return f"the tensors are on {', '.join(str(t.device) for t in tensors)}"
    return None


@torch.library.custom_op("zoo::halo_attention", mutates_args=(), device_types="cuda")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.halo_attention import triton_impl

    return triton_impl.forward(q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask)


@_op.register_fake
def _fake(q, k, v, height_rel, width_rel, block, halo, scale, stride, scale_rel, mask):
    batch, height, width, heads, _ = k.shape
    tiles, queries = cut(block // stride, max(q.shape[4], v.shape[4]))
    programs = batch * -(-height // block) * -(-width // block) * tiles * heads
    out = v.new_empty(batch, q.shape[1], q.shape[2], heads, v.shape[4])
    return out, v.new_empty(programs, queries, dtype=torch.float32)


@torch.library.custom_op("zoo::halo_attention_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from zoo.kernels.halo_attention import triton_impl

    sizes = (block, halo, scale, stride, scale_rel, mask)
    return triton_impl.backward(grad, q, k, v, height_rel, width_rel, out, lse, *sizes)


@_op_backward.register_fake
def _fake_backward(grad, q, k, v, height_rel, width_rel, out, lse, block, halo, scale, stride, scale_rel, mask):
    tables = [q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (height_rel, width_rel)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.sizes = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _grad_lse: Tensor | None):
    grads = torch.ops.zoo.halo_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    tables = grads[3:] if ctx.saved_tensors[3] is not None else (None, None)
    return *grads[:3], *tables, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)

_ENTRY = register(Op("halo_attention", reference.halo_attention, _triton, _unsupported, auto_in_compile=True))
