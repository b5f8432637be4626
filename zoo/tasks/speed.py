"""What makes training steps fast without changing what they compute: compilation and CUDA graphs."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = (nn.ModuleList, nn.Sequential)


def compile_in_place(backbone: nn.Module) -> None:
    """torch.compile of every block of `backbone`, wherever it has `blocks`, and of what lies beside; keys stay."""
    if not any(isinstance(getattr(module, "blocks", None), _ROWS) for module in backbone.modules()):
        backbone.compile()
        return
    parts = list(_parts(backbone))
    # Equal blocks share one compilation, which takes seconds instead of a minute. Blocks that differ (in width, or in a
    # drop path rate that grows with depth) need one each: allow that instead of falling back to eager after eight, and
    # keep the sizes of the stages apart instead of compiling once for all of them.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(parts))
    for part in parts:
        how: dict[str, Any] = {"dynamic": False, "options": _options(part)}
        if type(part).forward.__module__.startswith("torch."):
            # What part.compile() does, of a call in a frame of ours: torch.compile skips frames of torch's code, in
            # torch 2.11 nn.Sequential's too, so that each layer becomes a graph of its own, and nothing is fused.
            part._compiled_call_impl = torch.compile(_call_of(part), **how)
        else:
            part.compile(**how)


def _call_of(part: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: part._call_impl(*args, **kwargs)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks, and beside them stems and what changes the map between stages: whatever has something to fuse."""
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, _ROWS):
        yield from blocks
    for child in module.children():
        if child is blocks:
            continue
        inside = any(hasattr(one, "blocks") for one in child.modules())
        if inside or isinstance(child, nn.ModuleList):
            yield from _parts(child)
        elif sum(1 for one in child.modules() if list(one.parameters(recurse=False))) > 1:
            yield child


def _options(block: nn.Module) -> dict[str, Any] | None:
    # Up to torch 2.13 the gradient of a parameter (1, 1, C), which one kernel sums beside a sum over channels, comes
    # back as (C,), and autograd refuses it: pytorch issue 178080. The kernel gains little, so such blocks go without.
    mended = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 14)
    has_such = any(parameter.ndim > 1 and parameter.shape[0] == 1 for parameter in block.parameters())
    return {"triton.mix_order_reduction": False} if has_such and not mended else None


class TrainingGraph:
    """Forward and backward of a backbone as two CUDA graphs, replayed for images of the shape they were made for.

    The hundreds of kernels of a small network take the host longer to launch than the GPU to run; a replay is one
    launch. Images of another shape (a batch with an unreadable image) take the ordinary way. Random layers draw from
    torch's CUDA generator, so that what seeds it decides, as without graphs.

    Args:
        backbone: on a CUDA device, in training mode; its parameters stay where they are as long as this is in use.
        images: float (B, C, H, W), a batch such as will come, in the layout in which it will come.
    """

    def __init__(self, backbone: nn.Module, images: Tensor):
        buffers = [buffer.clone() for buffer in backbone.buffers()]
        # Of the current device; the networks' own steps must draw what they would without graphs.
        random = torch.cuda.get_rng_state()
        self._backbone, self._shape, self._eager = backbone, images.shape, backbone.forward
        # The graphs keep their gradients' nodes, made on another stream, for good: to torch that looks like a leak.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        # Casts kept from one call to the next would point at memory that the graph does not own.
        amp = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=amp, cache_enabled=False):
            torch.cuda.make_graphed_callables(backbone, (images,), allow_unused_input=True)
        self._graphed = backbone.forward
        backbone.forward = self._forward  # type: ignore[method-assign]
        # Making the graphs ran the network a few times: its running statistics and random layers have not seen those.
        for buffer, before in zip(backbone.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.cuda.set_rng_state(random)

    def _forward(self, images: Tensor) -> Tensor:
        return (self._graphed if images.shape == self._shape else self._eager)(images)

    def release(self) -> None:
        """Gives the backbone its own forward and the graphs' memory back."""
        del self._backbone.forward
        del self._graphed
