"""Runs a case: checks ours, then times it and its peers, one side at a time."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tools.bench.cases import Case, FunctionCase, Unavailable, Workload
from tools.bench.check import WrongAnswer, check_function, error
from tools.bench.timing import Memory, Rates, measure

COMPARE = ("timm", "softmax", "eager", "compile", "fused", "graph", "recipe")
PASSES = ("inference", "training")
# So much data in turn does not stay in the cache of a large GPU.
ROTATED = 192e6


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass(frozen=True)
class Options:
    """How to run cases.

    Args:
        device: "cuda" or "cpu".
        quick: toy sizes and few repeats.
        compare: of COMPARE.
        dtype: in which ops and layers compute.
        deadline: time.monotonic() after which nothing new is started.
        rates: of the device; None leaves floors out.
        passes: of networks, of "inference" and "training".
    """

    device: str
    quick: bool = False
    compare: tuple[str, ...] = COMPARE
    dtype: torch.dtype = torch.bfloat16
    deadline: float = math.inf
    rates: Rates | None = None
    passes: tuple[str, ...] = PASSES

    def within_budget(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime


def tidy() -> None:
    """Frees what the side before has left, so that it counts for no other."""
    torch._dynamo.reset()  # the memory of graphs goes with them
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(problem: BaseException) -> str:
    text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return f"{type(problem).__name__}: {text}"[:300]


def attempt(row: dict[str, Any], work: Callable[[], Any]) -> Any:
    """What `work` answers; a failure becomes the row's status and None, so that the next side can follow."""
    try:
        return work()
    except OutOfTime:
        row |= {"status": "left out", "reason": "the budget was spent"}
    except Unavailable as problem:
        row |= {"status": "unavailable", "reason": str(problem)}
    except WrongAnswer as problem:
        row |= {"status": "wrong", "reason": str(problem)}
    except Exception as problem:
        row |= {"status": "failed", "reason": first_line(problem)}
    return None


def run_case(case: Case, options: Options) -> Iterator[dict[str, Any]]:
    """The rows of a case, one for each side, mode and pass, as they come.

    A row has side, mode, pass and status ("ok", "wrong", "failed", "unavailable", "left out"); if ok: timing, peak_gb,
    floor_ms and share (ops and layers), images_per_second (networks), check (ours); else the reason.
    """
    if isinstance(case, FunctionCase):
        yield from run_function(case, options)
    else:
        from tools.bench.run_network import run_network

        yield from run_network(case, options)


def function_sides(case: FunctionCase, compare: tuple[str, ...]) -> list[tuple[str, str]]:
    sides = [("ours", "eager")]
    if case.kind == "layer" and "compile" in compare:
        sides.append(("ours", "compile"))
    if "eager" in compare if case.peer == "reference" else case.peer in compare:
        sides.append((case.peer, "eager"))
    # Mechanisms are many, and each would be compiled for longer than it is timed.
    if "compile" in compare and case.kind != "attention" and (case.peer == "reference" or case.peer in compare):
        sides.append((case.peer, "compile"))
    if "graph" in compare:
        sides.append(("ours", "graph"))
        if case.peer == "reference" or case.peer in compare:
            sides.append((case.peer, "graph"))
    return sides


def run_function(case: FunctionCase, options: Options) -> Iterator[dict[str, Any]]:
    """The rows of an op, a layer or a mechanism: forward, and forward with backward, of each side."""
    sizes = dict(case.quick if options.quick else case.sizes)
    for side, mode in function_sides(case, options.compare):
        tidy()
        row = {"side": side, "mode": mode, "status": "ok"}
        checked = attempt(row, lambda s=side, m=mode: _checked(case, s, m, sizes, options))
        if checked is None:
            yield row
            continue
        if checked:
            row["check"] = checked
        for what in ("forward+backward",) if case.kind == "attention" else ("forward", "forward+backward"):
            timed = dict(row, **{"pass": what})
            tidy()
            numbers = attempt(timed, lambda s=side, m=mode, w=what: _timed(case, s, m, w, sizes, options))
            yield timed | (numbers or {})


def _build(case: FunctionCase, side: str, mode: str, sizes: dict, options: Options) -> Workload:
    workload = case.build(side, options.device, **sizes)
    # One compilation of static shapes, as a network makes it.
    return replace(workload, call=torch.compile(workload.call, dynamic=False)) if mode == "compile" else workload


def _checked(case: FunctionCase, side: str, mode: str, sizes: dict, options: Options) -> dict[str, Any]:
    options.within_budget()
    if side != "ours":
        return {}
    torch.manual_seed(1)
    inputs = case.inputs(side, options.dtype, options.device, **sizes)
    workload = _build(case, side, mode, sizes, options)
    reference = case.build("reference", options.device, **sizes)
    return check_function(case, workload, reference, inputs, options.dtype, sums=mode != "compile")


def _timed(case: FunctionCase, side: str, mode: str, what: str, sizes: dict, options: Options) -> dict[str, Any]:
    options.within_budget()
    torch.manual_seed(2)
    memory = Memory(options.device)
    workload = _build(case, side, mode, sizes, options)
    if workload.module is not None:
        workload.module.train(what != "forward")
    sets = [case.inputs(side, options.dtype, options.device, **sizes)]
    step = forward if what == "forward" else forward_backward
    replay = partial(replayed, case, dtype=options.dtype) if mode == "graph" else _as_it_is
    first = step(workload, sets[0], options)
    first()
    memory.restart()
    # A replay allocates nothing: what its call takes was taken when its graph was made.
    first = replay(first)
    first()
    peak = memory.peak_gb()
    size = sum(x.numel() * x.element_size() for x in sets[0])
    more = 0 if options.device == "cpu" else rotations(size, *kept(peak, mode))
    sets += [case.inputs(side, options.dtype, options.device, **sizes) for _ in range(more)]
    calls = [first, *(replay(step(workload, one, options)) for one in sets[1:])]
    timing = measure(calls, options.device, options.quick)
    return {"timing": timing.record(), "peak_gb": peak} | _floor(case, what, sizes, options, timing.median_ms)


def rotations(size: float, each: float, free: float) -> int:
    """How many more sets of inputs take turns: so many that no cache holds them, as far as memory goes.

    Args:
        size: bytes of the inputs of a set.
        each, free: bytes that a set takes besides for as long as it is there, and bytes that are free.
    """
    return max(0, min(7, math.ceil(ROTATED / size) - 1, int(0.8 * free / each) if each else 7))


def kept(peak_gb: float | None, mode: str) -> tuple[float, float]:
    """Bytes that a set of inputs keeps for itself, and free ones: a graph never gives back what its call took."""
    if mode != "graph" or peak_gb is None:
        return 0.0, 0.0
    return 1e9 * peak_gb, torch.cuda.mem_get_info()[0]


def _as_it_is(call: Callable[[], Any]) -> Callable[[], Any]:
    return call


def replayed(case: FunctionCase, call: Callable[[], Any], dtype: torch.dtype) -> Callable[[], Any]:
    """The call as one CUDA graph, which costs the host one launch, as in our recipes and in a compiled network.

    Raises:
        Unavailable: there is no CUDA.
        WrongAnswer: a replay does not answer what the call does.
    """
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need CUDA")
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            want = [answer.cpu() for answer in _tensors(call())]
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    graph.replay()
    # Compared on the CPU, where it counts for no peak.
    for mine, other in zip(_tensors(held), want, strict=True):
        off = error(mine.cpu(), other)
        # cuDNN's gradients of weights may sum in another order from one call to the next.
        if not off <= case.tolerance[str(dtype).removeprefix("torch.")]:
            raise WrongAnswer(f"a replay of the graph is off by {off:.1e} from the call itself")

    def play(kept: Any = call) -> Any:
        # The call owns what the graph reads, the output's gradient for one.
        graph.replay()
        return held

    return play


def _tensors(answer: Any) -> list[torch.Tensor]:
    return [t for t in (answer if isinstance(answer, tuple) else (answer,)) if t is not None]


def _floor(case: FunctionCase, what: str, sizes: dict, options: Options, ms: float) -> dict[str, float]:
    if options.rates is None:
        return {}
    moved, flops = case.cost(**sizes).of(what)
    floor = options.rates.floor_ms(moved, flops)
    return {"bytes": moved, "flops": flops, "floor_ms": floor, "share": floor / ms}


def forward(workload: Workload, inputs: tuple, options: Options) -> Callable[[], Any]:
    device, mixed = options.device, workload.autocast and options.dtype != torch.float32

    def step() -> Any:
        # Casts kept from one call to the next would point at memory that a graph does not own.
        with torch.no_grad(), torch.autocast(device, options.dtype, enabled=mixed, cache_enabled=False):
            return workload.call(*inputs)

    return step


def forward_backward(workload: Workload, inputs: tuple, options: Options) -> Callable[[], Any]:
    device, mixed = options.device, workload.autocast and options.dtype != torch.float32
    leaves = [*inputs, *workload.parameters]
    grads: list[torch.Tensor] = []

    def step() -> Any:
        with torch.autocast(device, options.dtype, enabled=mixed, cache_enabled=False):
            out = workload.call(*inputs)
        if not grads:
            # Laid out as the output is, and no zeros or ones, whose products can be cheaper.
            grads.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, grads[0], allow_unused=True)

    return step
