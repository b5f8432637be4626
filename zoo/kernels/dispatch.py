"""One decision a call: which implementation of an op runs."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def default_impl(value: str | None) -> str:
    """The implementation that "auto" stands for, from the value of ZOO_KERNELS.

    Raises:
        ValueError: the value is none of auto, reference, triton.
    """
    if value in (None, ""):
        return "auto"
    if value not in IMPLS:
        raise ValueError(f"ZOO_KERNELS={value!r}; valid: {', '.join(IMPLS)}")
    return str(value)


# Read once: a look into the environment costs more than a small kernel.
DEFAULT = default_impl(os.environ.get("ZOO_KERNELS"))


def use_triton(impl: str, x: Any, unsupported: Callable[[], str | None]) -> bool:
    """Whether the registered Triton op runs, rather than the reference.

    Args:
        impl: "auto", "reference" or "triton", as the caller of the op gave it.
        x: the op's first tensor.
        unsupported: the op's own first reason that rules the Triton implementation out, or None.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: "triton" was asked for, by the caller or by ZOO_KERNELS on a GPU, and something rules it out.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        # torch.compile fuses a reference of few operations as well as a kernel runs it.
        if DEFAULT == "reference" or isinstance(x, torch.fx.Proxy) or not x.is_cuda:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        reason = None if HAS_TRITON else _NO_TRITON
        reason = reason or unsupported()
        if reason is not None and DEFAULT == "triton":
            raise RuntimeError(f"ZOO_KERNELS=triton, but {reason}")
        return reason is None
    if impl != "triton":
        raise ValueError(f"impl={impl!r}; valid: {', '.join(IMPLS)}")
    reason = _reason_against(x) or unsupported()
    if reason is not None:
        raise RuntimeError(f"impl='triton' was asked for, but {reason}")
    return True


_NO_TRITON = "triton is not installed (pip install triton)"


def _reason_against(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return _NO_TRITON
    # Inside torch.compile some releases say that they export, too.
    exports = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if isinstance(x, torch.fx.Proxy) or exports or torch.jit.is_tracing():
        return "the graph is being exported, and a kernel has no place in it"
    return None if x.is_cuda else f"the tensor is on {x.device}, and Triton kernels need CUDA"

