"""What a case of the benchmark is, and the one registry of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

KINDS = ("op", "layer", "attention", "network", "headline")


class Unavailable(RuntimeError):
    """A case, or a side of it, cannot run here; the message says why."""


@dataclass(frozen=True)
class Cost:
    """The least that a computation moves and does, whatever the implementation.

    Args:
        forward_bytes: every input read once, the output written once.
        forward_flops: multiply-adds count as two.
        backward_bytes: inputs and the output's gradient read once, the gradients written once.
        backward_flops: without what an implementation does again to save memory.
    """

    forward_bytes: float
    forward_flops: float
    backward_bytes: float
    backward_flops: float

    def of(self, what: str) -> tuple[float, float]:
        """Bytes and flops of a pass, "forward" or "forward+backward"."""
        if what == "forward":
            return self.forward_bytes, self.forward_flops
        return self.forward_bytes + self.backward_bytes, self.forward_flops + self.backward_flops


@dataclass
class Workload:
    """One side of a case, ready to be called.

    Args:
        call: takes the inputs of the case, answers one tensor.
        parameters: whose gradients a backward pass makes, besides those of the inputs.
        module: to switch between training and evaluation, or None.
        autocast: whether it runs under autocast; an op gets its inputs in the dtype instead.
    """

    call: Callable[..., Tensor]
    parameters: list[Tensor] = field(default_factory=list)
    module: nn.Module | None = None
    autocast: bool = False


@dataclass(frozen=True)
class FunctionCase:
    """An op, a layer or an attention mechanism: tensors in, one tensor out.

    Args:
        name: unique, in file names too.
        kind: "op", "layer" or "attention", which is timed in training alone.
        title: what a table calls it.
        op: the op of zoo.kernels that it is about; "" for a mechanism.
        sizes, quick: keywords of `inputs`, `build` and `cost`; `quick` are toy ones for a look on the CPU.
        inputs: (side, dtype, device, **sizes) -> arguments of the call; tensors of the batch have it first.
        build: (side, device, **sizes) -> Workload; sides are "ours", the peer's and "reference", which must be able to
            run in float64; equal weights every time.
        cost: (**sizes) -> Cost.
        batched: places of the arguments that have the batch first.
        peer: the side that ours is compared with: "reference" (an op's own, in the case's dtype), "timm" or "softmax".
        tolerance: of ||ours - reference|| / ||reference|| by dtype, for the output and for each gradient.
        about: what a table says of it besides.
    """

    name: str
    kind: str
    title: str
    op: str
    sizes: Mapping[str, Any]
    quick: Mapping[str, Any]
    inputs: Callable[..., tuple[Any, ...]]
    build: Callable[..., Workload]
    cost: Callable[..., Cost]
    batched: tuple[int, ...]
    peer: str
    # Operands in bfloat16 round by 2^-9; a product of two such operands and a softmax between them stay within a
    # few times that. float32 products may run in TF32, which rounds by 2^-11.
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-3})
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """Figures of a peer that cannot be installed, timed by the maintainers outside this tool.

    Args:
        peer: whose network.
        device: part of the name of the kind of GPU; beside ours on another kind they say nothing.
        source: hardware and versions of that run.
        images_per_second: {"inference" | "training": {"eager" | "compile": images/s}}.
        peak_gb: likewise.
    """

    peer: str
    device: str
    source: str
    images_per_second: Mapping[str, Mapping[str, float]]
    peak_gb: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class NetworkCase:
    """A whole network in inference and in training, or in a headline a paper's ratio of two networks.

    Args:
        name, kind, title: as in FunctionCase; kind "network" or "headline".
        ours, peer: make the network for an image size; None where there is none to time.
        ours_name, peer_name: what a table calls them.
        img_size, peer_img_size: side of the square input; `peer_img_size` None for the same.
        quick_size: of the toy run.
        passes: of "inference" and "training".
        inference_batch, training_batch: images.
        elsewhere: the peer's figures where it cannot be installed.
        reference: makes the network that says what is right, with the weights of `ours`; None: `ours` in float32 with
            the reference implementation of every op.
        claim: a headline's ratio as its paper has it, with where it says so.
        note: a sentence under the table.
    """

    name: str
    kind: str
    title: str
    ours: Callable[[int], nn.Module] | None
    ours_name: str
    peer: Callable[[int], nn.Module] | None = None
    peer_name: str = ""
    img_size: int = 224
    peer_img_size: int | None = None
    quick_size: int = 64
    passes: tuple[str, ...] = ("inference", "training")
    inference_batch: int = 256
    training_batch: int = 128
    elsewhere: Elsewhere | None = None
    reference: Callable[[int], nn.Module] | None = None
    claim: str = ""
    note: str = ""


Case = FunctionCase | NetworkCase

CASES: dict[str, Case] = {}


def register(case: Case) -> Case:
    """Adds a case to the registry.

    Raises:
        ValueError: the name is taken, or the kind is none of KINDS.
    """
    if case.name in CASES:
        raise ValueError(f"there is a case {case.name!r} already; choose another name")
    if case.kind not in KINDS:
        raise ValueError(f"kind={case.kind!r}; valid: {', '.join(KINDS)}")
    CASES[case.name] = case
    return case


def select(kinds: tuple[str, ...], pattern: str = "*") -> list[Case]:
    """The cases of these kinds whose name has `pattern` in it (shell wildcards allowed), in the order of the registry.

    Raises:
        ValueError: there is none.
    """
    known = [case for case in CASES.values() if case.kind in kinds]
    found = [case for case in known if fnmatch(case.name, f"*{pattern}*")]
    if not found:
        raise ValueError(f"no case matches {pattern!r}; there are: {', '.join(case.name for case in known)}")
    return found
