"""The registry of ops, and the one decision a call: which implementation runs."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from zoo.kernels.precision import without_autocast

IMPLS = ("auto", "reference", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Op:
    """One op; its functions take the same tensors in the same order.

    Args:
        name: as in zoo.kernels.<name>.
        reference: plain torch, the definition of correct.
        triton: the op registered with torch.library whose CUDA implementation is the kernel.
        unsupported: the first reason, of shape, dtype or device of these tensors, that rules the kernel out, or None.
        slower: the first reason why "auto" leaves these tensors to the reference though the kernel takes them, or None;
            `explain` tells it.
        auto_in_compile: whether "auto" takes the kernel inside torch.compile too. False for a reference of few
            operations, which the compiler fuses into its neighbours; a measured gain is the reason to set it.
    """

    name: str
    reference: Callable[..., Tensor]
    triton: Callable[..., Tensor]
    unsupported: Callable[..., str | None]
    auto_in_compile: bool = False
    slower: Callable[..., str | None] = lambda *_: None


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to the registry that tests and benchmarks run over.

    Raises:
        ValueError: there is an op of that name.
    """
    if op.name in OPS:
        raise ValueError(f"kernel op {op.name!r} is registered already; choose another name")
    OPS[op.name] = op
    return op


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


@contextlib.contextmanager
def standing_for(impl: str) -> Iterator[None]:
    """A context in which "auto" stands for this implementation of every op."""
    global DEFAULT
    before, DEFAULT = DEFAULT, default_impl(impl)
    try:
        yield
    finally:
        DEFAULT = before


def dispatch(op: Op, impl: str, *tensors: Any) -> Tensor:
    """Runs the op on its tensors, the first of which decides: on the CPU and in an exported graph by the reference.

    Args:
        op: the entry of the registry.
        impl: "auto", "reference" or "triton", as the caller of the op gave it. "auto" is what ZOO_KERNELS says;
            ZOO_KERNELS=triton holds on CUDA, so that a program which also works on the CPU, or exports, still runs.
        tensors: what the op's functions take.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: "triton" was asked for, by the caller or by ZOO_KERNELS, and something rules it out.
    """
    if _takes_triton(op, impl, tensors):
        return op.triton(*tensors)
    with without_autocast(tensors[0]):
        return op.reference(*tensors)


def _takes_triton(op: Op, impl: str, tensors: tuple) -> bool:
    x = tensors[0]
    if impl == "reference":
        return False
    if impl == "auto":
        if DEFAULT == "reference" or elsewhere(x):
            return False
        if DEFAULT == "triton":
            return _insist("ZOO_KERNELS=triton", op, tensors)
        return _left(op, tensors) is None
    if impl != "triton":
        raise ValueError(f"impl={impl!r}; valid: {', '.join(IMPLS)}")
    return _insist("impl='triton'", op, tensors)


def kernel_for(name: str, *tensors: Any) -> Callable[..., Tensor] | None:
    """The kernel of an op if impl="auto" takes it for these arguments, else None: for who has a reference of their own.

    Args:
        name: of an op, as in zoo.kernels.<name>.
        tensors: its arguments, which the kernel then takes too.

    Raises:
        RuntimeError: ZOO_KERNELS is triton and something rules the kernel out.
    """
    op = OPS[name]
    return op.triton if _takes_triton(op, "auto", tensors) else None


def _left(op: Op, tensors: tuple) -> str | None:
    """The first reason why "auto" leaves tensors on a GPU to the reference, or None."""
    if not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if torch.compiler.is_compiling() and not op.auto_in_compile:
        return "torch.compile fuses the reference into its neighbours"
    return _unanswered() or op.unsupported(*tensors) or op.slower(*tensors)


def explain(name: str, *tensors: Any) -> str:
    """What impl="auto" takes for these arguments, and why: "triton", or "reference: " and the first reason.

    With ZOO_KERNELS=triton, what rules a kernel out is the message of "an error: " that the call would raise.

    Args:
        name: of an op, as in zoo.kernels.<name>.
        tensors: its arguments, constants too, without `impl`.

    Raises:
        ValueError: there is no such op.
    """
    if name not in OPS:
        raise ValueError(f"there is no kernel op {name!r}; valid: {', '.join(OPS)}")
    if DEFAULT == "reference":
        return "reference: ZOO_KERNELS=reference"
    if elsewhere(tensors[0]):
        return f"reference: the tensor is on {tensors[0].device}, or a graph is made of it for elsewhere"
    if DEFAULT == "triton":
        try:
            _insist("ZOO_KERNELS=triton", OPS[name], tensors)
        except RuntimeError as problem:
            return f"an error: {problem}"
        return "triton: ZOO_KERNELS=triton"
    reason = _left(OPS[name], tensors)
    return "triton" if reason is None else f"reference: {reason}"


def _insist(who: str, op: Op, tensors: tuple) -> bool:
    if not HAS_TRITON:
        reason: str | None = "triton is not installed (pip install triton)"
    elif not elsewhere(tensors[0]):
        reason = _unanswered() or op.unsupported(*tensors)
    elif _exported(tensors[0]):
        reason = "the graph is being exported, and a kernel has no place in it"
    else:
        reason = f"the tensor is on {tensors[0].device}, and Triton kernels need CUDA"
    if reason is not None:
        raise RuntimeError(f"{who} was asked for, but in {op.name} {reason}")
    return True


def _unanswered() -> str | None:
    """Why a registered op would answer wrongly, or not at all, whatever its tensors; or None."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken, which a kernel would drop"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the call, which a kernel does not know how to"
    return None


def elsewhere(x: Any) -> bool:
    """Whether this call is none for a kernel, whatever its shapes: a graph for other machines, or no GPU."""
    return _exported(x) or not x.is_cuda


def _exported(x: Any) -> bool:
    """Whether a graph is made of x for elsewhere: by torch.export, torch.jit.trace or torch.fx."""
    # The flag behind is_exporting(), which in torch 2.11 answers True in all of torch.compile.
    return isinstance(x, torch.fx.Proxy) or torch.compiler._is_exporting_flag or torch.jit.is_tracing()
