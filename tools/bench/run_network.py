"""Times whole networks: inference and training, eager, compiled and as the recipes train."""

import gc
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.cases import NetworkCase
from tools.bench.check import allowed, check_network, error, exact_maths, verdict
from tools.bench.run import Options, attempt, tidy
from tools.bench.timing import Memory, measure

ROOT = Path(__file__).resolve().parents[2]
# The least that a step's gradient of all parameters in bfloat16 may be off by, next to an eager one in float32.
GRADIENT = 5e-2


def speed() -> ModuleType:
    """zoo/tasks/speed.py by its path: its package needs lightning, which a machine for timing may lack."""
    path = ROOT / "zoo" / "tasks" / "speed.py"
    spec = importlib.util.spec_from_file_location("zoo_tasks_speed", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Ways of running that a pass has not.
NOT_OF_PASS = (("recipe", "inference"), ("fused", "training"), ("graph", "training"))


def network_sides(case: NetworkCase, compare: tuple[str, ...]) -> list[tuple[str, str]]:
    # What takes long to compile comes last, so that a budget cuts that.
    modes = [mode for mode in ("eager", "recipe", "compile", "fused", "graph") if mode in compare] or ["eager"]
    sides: list[tuple[str, str]] = []
    for mode in modes:
        if case.ours:
            sides.append(("ours", mode))
        # `recipe` is how our own trainer does it.
        if case.peer and ("timm" in compare or not case.ours) and mode != "recipe":
            sides.append(("timm", mode))
    return sides


def run_network(case: NetworkCase, options: Options) -> Iterator[dict[str, Any]]:
    """The rows of a network: inference and training of each side and mode."""
    for side, mode in network_sides(case, options.compare):
        for what in options.passes:
            if what not in case.passes or (mode, what) in NOT_OF_PASS:
                continue
            row = {"side": side, "mode": mode, "pass": what, "status": "ok"}
            tidy()
            work = _inference if what == "inference" else _training
            row |= attempt(row, partial(work, case, side, mode, options)) or {}
            tidy()
            yield row


def autocast(device: str) -> Callable[[], Any]:
    return partial(torch.autocast, device, torch.bfloat16)


def make(case: NetworkCase, side: str, options: Options) -> tuple[nn.Module, int]:
    """The network of a side on the device, and the side of its images."""
    build = case.ours if side == "ours" else case.peer
    assert build is not None
    size = case.img_size if side == "ours" else case.peer_img_size or case.img_size
    size = case.quick_size if options.quick else size
    network = build(size).to(options.device)
    return (network.to(memory_format=torch.channels_last) if takes_channels_last(network) else network), size


def takes_channels_last(network: nn.Module) -> bool:
    """False for timm's own LambdaLayer, which fails on such maps."""
    from timm.layers.lambda_layer import LambdaLayer

    return not any(type(module) is LambdaLayer for module in network.modules())


def draw_images(network: nn.Module, batch: int, size: int, device: str) -> Tensor:
    images = torch.randn(batch, 3, size, size, device=device)
    layout = torch.channels_last if takes_channels_last(network) else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def prepare(network: nn.Module, mode: str) -> nn.Module:
    """The network as its mode runs it; parameters stay the same objects."""
    if mode in ("fused", "graph"):
        from timm.utils import reparameterize_model

        # Batch norms folded into the convolutions before them, where the network knows how: timm's way, for both sides.
        network = reparameterize_model(network, inplace=True)
    if mode == "graph":
        return torch.compile(network, mode="reduce-overhead")  # type: ignore[return-value]
    if mode in ("compile", "fused"):
        return torch.compile(network)  # type: ignore[return-value]
    if mode == "recipe":
        speed().compile_in_place(network)
    return network


def _numbers(
    step: Callable[[], Any], memory: Memory, batch: int, options: Options, replayed: bool = False
) -> dict[str, Any]:
    step()
    if not replayed:
        memory.restart()
    step()
    peak = memory.peak_gb()
    timing = measure([step], options.device, options.quick)
    return {
        "timing": timing.record(),
        "peak_gb": peak,
        "batch": batch,
        "images_per_second": 1e3 * batch / timing.median_ms,
    }


def reference_of(case: NetworkCase, options: Options) -> nn.Module:
    build = case.reference or case.ours
    assert build is not None
    return build(case.quick_size if options.quick else case.img_size).to(options.device).eval()


def settle(reference: nn.Module, network: nn.Module, images: Tensor) -> None:
    """Gives the batch norms of both the statistics of these images, enough of them for 1x1 maps too.

    With those of a fresh network, activations grow from layer to layer, and so does what rounding does to them.
    """
    norms = [m for m in reference.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    reference.train()
    with torch.no_grad(), exact_maths():
        reference(images.float().contiguous())
    reference.eval()
    network.load_state_dict(reference.state_dict())


def settled(case: NetworkCase, network: nn.Module, size: int, options: Options) -> nn.Module:
    """The reference; both get equal statistics of batch norms. Before anything is folded into anything."""
    reference = reference_of(case, options)
    settle(reference, network, draw_images(reference, 16, size, options.device))
    return reference


def build_inference(
    case: NetworkCase, side: str, mode: str, options: Options, check: bool = True
) -> tuple[Callable[[], Tensor], int, dict[str, Any]]:
    """A step of a network in evaluation mode, the batch, and what the check of its answer found."""
    batch = 2 if options.quick else case.inference_batch
    network, size = make(case, side, options)
    images = draw_images(network, batch, size, options.device)
    reference = settled(case, network, size, options) if check and side == "ours" else None
    runner = prepare(network.eval(), mode)
    found = {}
    if reference is not None:
        found = {"check": check_network(runner, reference, images, autocast(options.device), False)}

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(options.device, torch.bfloat16):
            return runner(images)

    return step, batch, found


def _inference(case: NetworkCase, side: str, mode: str, options: Options) -> dict[str, Any]:
    options.within_budget()
    memory = Memory(options.device)
    step, batch, check = build_inference(case, side, mode, options)
    tidy_cache(options)
    if mode == "graph":
        # torch records in the second call, which is the first here where a check was before: both count, none later.
        memory.restart()
    return _numbers(step, memory, batch, options, replayed=mode == "graph") | check


def tidy_cache(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.empty_cache()


def training_step(
    network: nn.Module, runner: nn.Module, images: Tensor, targets: Tensor, device: str | None
) -> Callable[[], Tensor]:
    """Forward, loss and backward, without the optimizer; under autocast on `device`, or in float32 for None."""
    context = partial(exact_maths, "auto") if device is None else autocast(device)

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        with context():
            logits = runner(images)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        return loss

    return step


def gradient(network: nn.Module, step: Callable[[], Tensor]) -> Tensor:
    """The gradient of all parameters after one step, on the CPU, where it counts for no peak."""
    step()
    found = [torch.zeros(p.numel()) if p.grad is None else p.grad.float().flatten().cpu() for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    return torch.cat(found)


def build_training(
    case: NetworkCase, side: str, mode: str, options: Options, check: bool = True
) -> tuple[nn.Module, Callable[[], Tensor], int, dict[str, Any], Any]:
    """A network in training, its step, the batch, what the check of it found, and the graph to release."""
    check = check and side == "ours"
    batch = 4 if options.quick else case.training_batch
    network, size = make(case, side, options)
    result: dict[str, Any] = {}
    if check and mode == "eager":
        few = draw_images(network, min(batch, 16), size, options.device)
        reference = settled(case, network.eval(), size, options)
        result = {"check": check_network(network, reference, few, autocast(options.device), True)}
        del reference
    network.train()
    images = draw_images(network, batch, size, options.device)
    targets = torch.randint(0, 1000, (batch,), device=options.device)
    plain = training_step(network, network, images, targets, options.device)
    exact = stray = None
    if check and mode != "eager":
        exact = gradient(network, training_step(network, network, images, targets, None))
        stray = error(gradient(network, plain), exact)
    runner, graph = prepare(network, mode), None
    if mode == "recipe" and options.device == "cuda":
        gc.collect()  # what an eager step may have left belongs to another stream than the graphs will
        # A replay allocates nothing: what its step takes was taken when the graphs were made.
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            graph = speed().TrainingGraph(network, images)
    step = training_step(network, runner, images, targets, options.device)
    if exact is not None and stray is not None:
        off = {"the gradient of all parameters": error(gradient(network, step), exact)}
        result = {"check": verdict(off, allowed(GRADIENT, stray)) | {"eager_error": stray}}
    return network, step, batch, result, graph


def _training(case: NetworkCase, side: str, mode: str, options: Options) -> dict[str, Any]:
    options.within_budget()
    memory = Memory(options.device)
    _, step, batch, check, graph = build_training(case, side, mode, options)
    tidy_cache(options)
    numbers = _numbers(step, memory, batch, options, replayed=graph is not None) | check
    if graph is not None:
        graph.release()
    return numbers
