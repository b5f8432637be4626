"""The public op."""

import torch
from torch import Tensor

from zoo.kernels.dispatch import Op, dispatch, register
from zoo.kernels.halo_attention import reference


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
        height_rel, width_rel: (2 * w - 1, dk), shared by the heads; or None for both.
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
    rows, columns = -(-k.shape[1] // stride), -(-k.shape[2] // stride)
    if q.shape[1] != rows or q.shape[2] != columns:
        raise ValueError(
            f"halo_attention: {q.shape[1]} x {q.shape[2]} queries for {k.shape[1]} x {k.shape[2]} keys; "
            f"with stride={stride} there must be {rows} x {columns}"
        )
    if k.shape[:4] != v.shape[:4] or q.shape[3] != k.shape[3] or q.shape[4] != k.shape[4]:
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


def _triton(*tensors) -> Tensor:
    raise RuntimeError(_unsupported(*tensors))


def _unsupported(*tensors) -> str | None:
    return "there is no kernel yet"


_ENTRY = register(Op("halo_attention", reference.halo_attention, _triton, _unsupported, auto_in_compile=True))
