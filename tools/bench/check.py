"""Whether an answer is right, before anybody hears how fast it came."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.cases import FunctionCase, Workload


class WrongAnswer(RuntimeError):
    """The answer is not the reference's."""


def error(answer: Tensor, right: Tensor) -> float:
    """||answer - right|| / ||right|| in float64; infinite where the answer is not finite."""
    answer, right = answer.detach().double(), right.detach().double()
    if not bool(answer.isfinite().all()):
        return float("inf")
    size = right.norm().item()
    return (answer - right).norm().item() / size if size else answer.norm().item()


def verdict(errors: dict[str, float], tolerance: float) -> dict[str, Any]:
    """The worst of these errors as a record.

    Raises:
        WrongAnswer: it is above the tolerance.
    """
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        raise WrongAnswer(f"{worst} is off by {errors[worst]:.2g} of its size; {tolerance:g} is allowed")
    return {"error": errors[worst], "of": worst, "tolerance": tolerance}


def gradients(workload: Workload, inputs: tuple, grad: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The output and the gradients of inputs and parameters, for an output gradient (drawn here if None)."""
    leaves = [x for x in inputs if isinstance(x, Tensor)] + workload.parameters
    with torch.autocast(leaves[0].device.type, dtype, enabled=workload.autocast and dtype != torch.float32):
        out = workload.call(*inputs)
    grad = torch.randn_like(out) if grad is None else grad.to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return out, grad, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def check_function(
    case: FunctionCase, workload: Workload, reference: Workload, inputs: tuple, dtype: torch.dtype, sums: bool = True
) -> dict[str, Any]:
    """Compares output and all gradients with the reference in float64.

    The full batch is run, and its first and last image compared; gradients that sum over the batch are compared for
    those two images alone, so that the reference fits into memory, and not at all without `sums`: what is compiled
    would be compiled once more for them.

    Raises:
        WrongAnswer: something is off by more than the case allows.
    """
    for one in (workload, reference):
        if one.module is not None:
            one.module.eval()
    full = gradients(workload, inputs, None, dtype)
    picks = [0, full[0].shape[0] - 1]
    few = tuple(_pick(x, picks, i in case.batched) for i, x in enumerate(inputs))
    if reference.module is not None:
        reference.module.double()
    # In plain layout, which every reference takes.
    wide = tuple(x.detach().double().contiguous().requires_grad_() for x in few)
    exact = Workload(reference.call, reference.parameters)
    right = gradients(exact, wide, full[1][picks].double(), torch.float32)
    errors = {"the output": error(full[0][picks], right[0])}
    small = gradients(workload, few, full[1][picks], dtype) if sums else None
    if small is not None:
        errors["the output of two"] = error(small[0], right[0])
    if not bool(full[0].isfinite().all()):
        errors["the whole output"] = float("inf")
    for i in range(len(right) - 2):
        name = f"the gradient of input {i}" if i < len(inputs) else f"the gradient of parameter {i - len(inputs)}"
        if _vanishes(right[i + 2], right[2:]):
            continue
        if small is not None:
            errors[name] = error(small[i + 2], right[i + 2])
        if i in case.batched:
            errors[f"{name}, full batch"] = error(full[i + 2][picks], right[i + 2])
    return verdict(errors, case.tolerance[str(dtype).removeprefix("torch.")])


def _pick(x: Any, picks: list[int], batched: bool) -> Tensor:
    return (x.detach()[picks] if batched else x.detach().clone()).requires_grad_()


def _vanishes(gradient: Tensor, others: tuple[Tensor, ...]) -> bool:
    # A gradient that is zero but for rounding (a bias before a softmax) has no size to compare an error with.
    return gradient.norm().item() < 1e-9 * max(other.norm().item() for other in others)


@contextlib.contextmanager
def exact_maths(impl: str = "reference") -> Iterator[None]:
    """float32 products without TF32, and "auto" standing for this implementation of every op."""
    from zoo.kernels.dispatch import standing_for

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = False, False
    try:
        with standing_for(impl):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# Of the logits, and of the gradient of the images. In float32 the kernels' products may run in TF32. In bfloat16 random
# networks turn rounding into per cents of the logits and tens of per cents of the gradient: there the reference network
# in bfloat16 is the measure, and ours may stray from float32 twice as far. Never as far as an answer of zeros, though.
FLOAT32 = (2e-2, 1e-1)
BFLOAT16 = (5e-2, 2e-1)
CEILING = 0.9


def allowed(least: float, stray: float) -> float:
    """How far ours may be off where a right implementation is off by `stray`."""
    return min(CEILING, max(least, 2 * stray))


def answers(
    network: nn.Module, images: Tensor, context: Callable[[], Any], grad: Tensor | None, picks: list[int]
) -> list[Tensor]:
    """Logits of the picked images; with `grad`, that of their logits, the gradient of these images too."""
    images = images.detach().requires_grad_(grad is not None)
    # Without gradients as in a timed inference, so that a compiled network is compiled for it once.
    with contextlib.nullcontext() if grad is not None else torch.inference_mode(), context():
        logits = network(images)
    if not bool(logits.isfinite().all()):
        raise WrongAnswer("some logits are not finite")
    if grad is None:
        return [logits[picks]]
    whole = torch.zeros_like(logits)
    whole[picks] = grad.to(whole.dtype)
    return [logits[picks].detach(), torch.autograd.grad(logits, images, whole)[0][picks]]


def check_network(
    network: nn.Module, reference: nn.Module, images: Tensor, autocast: Callable[[], Any], backward: bool = True
) -> dict[str, Any]:
    """Compares the logits of the first and last image with those of the reference network in float32.

    Args:
        network: in evaluation mode, compiled or not; runs the whole batch under `autocast`.
        reference: with equal weights; gets the two images alone, and reference implementations of every op.
        images: (B, C, H, W).
        autocast: makes the context of the network.
        backward: whether the gradient of the images is compared too, and both in float32 besides.

    Raises:
        WrongAnswer: something is off by more than is allowed.
    """
    picks, both = [0, images.shape[0] - 1], [0, 1]
    few = images.detach()[picks]
    plain = few.contiguous()  # a layout that every reference takes

    def low() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(exact_maths())
        stack.enter_context(autocast())
        return stack

    right = answers(reference, plain, exact_maths, None, both)
    grad = torch.randn_like(right[0]) if backward else None
    if backward:
        right = answers(reference, plain, exact_maths, grad, both)
    names = ("the logits", "the gradient of the images")
    result: dict[str, Any] = {}
    if backward:
        got = answers(network, few, partial(exact_maths, "auto"), grad, both)
        for name, limit, one, good in zip(names, FLOAT32, got, right, strict=True):
            result |= {f"float32 {name}": verdict({f"{name} in float32": error(one, good)}, limit)["error"]}
    stray = [error(one, good) for one, good in zip(answers(reference, plain, low, grad, both), right, strict=True)]
    got = answers(network, images, autocast, grad, picks)
    for name, least, one, good, off in zip(names, BFLOAT16, got, right, stray, strict=False):
        found = verdict({name: error(one, good)}, allowed(least, off)) | {"reference_error": off}
        result |= found if name == names[0] else {f"bfloat16 {name}": found}
    return result
