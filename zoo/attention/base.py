"""The contract that every attention mechanism keeps, and the small pieces that several of them share."""

import math
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.errors import UsageError

# Added to the logit of a key that may not be attended. Finite, so that a row without any key stays free of NaN in
# forward and backward; exp(-3e4) is exactly 0 in every dtype, and fp16 can hold it.
MASKED = -3.0e4

Grid = tuple[int, int]


# A leaf for FX: what a mechanism does depends on the grid (padding, masks, resized tables), which is no constant there.
@register_notrace_module
class Attention(nn.Module):
    """One attention mechanism in its native layout.

    Layout "tokens": x is (B, P + H*W, dim), P prefix tokens first, then the grid row by row; the answer is
    (B, P + H'*W', dim_out). Layout "map": x is (B, dim, H, W); the answer is (B, dim_out, H', W').

    `forward` and `attention_map` of every mechanism take

    * grid: (H, W); only tokens whose grid is not `grid_size` nor square need it,
    * key_mask: bool (B or 1, keys), True where a key may be attended; a query without any key answers zero before the
      output projection,
    * bias: float, broadcastable to (B, heads, queries, keys), added to the logits.

    They should be passed by keyword. They are not keyword-only because TorchScript cannot compile such arguments.
    """

    layout: str = "tokens"
    # Names of own parameters, besides vectors, that weight decay would pull from where they start for a reason.
    undecayed: tuple[str, ...] = ()
    # Whether answers depend on tokens that a bias keeps apart from the query: by a norm or convolution over the grid.
    crosses_bias: bool = False

    def __init__(self, dim: int, dim_out: int | None = None, grid_size: Grid = (14, 14), num_prefix_tokens: int = 0):
        super().__init__()
        self.dim = dim
        self.dim_out = dim if dim_out is None else dim_out
        self.grid_size = (int(grid_size[0]), int(grid_size[1]))
        self.num_prefix_tokens = num_prefix_tokens

    def out_grid(self, grid: Grid) -> Grid:
        """The grid (H', W') of the answer to a grid (H, W): the same unless the mechanism has a stride."""
        return grid

    def complete(self, state: dict[str, Any], prefix: str) -> None:
        """Adds to a state of weights, under names that begin with `prefix`, what may keep its start: nothing."""

    def attention_map(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """The weights (B, heads, queries, keys), explicit or implied, that the mechanism gives to x; for looking."""
        raise NotImplementedError(f"{type(self).__name__} has no attention map")

    def head_layers(self) -> list[tuple[nn.Module, int]]:
        """Layers whose input is what heads answer, side by side in its channels, each with the number of these heads.

        This is where a head is masked. Without heads there are none; those of mechanisms inside are their own.
        """
        heads, proj = getattr(self, "num_heads", 0), getattr(self, "proj", None)
        return [(proj, heads)] if heads and isinstance(proj, nn.Module) else []

    def token_grid(self, x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The grid of tokens x (B, P + H*W, C): as given, else `grid_size` where it fits, else a square.

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        count = x.shape[1] - self.num_prefix_tokens
        if grid is None:
            height, width = self.grid_size
            if height * width != count:
                height = int(math.sqrt(count) + 0.5)
                width = height
        else:
            height, width = grid
        if height * width != count:
            raise ValueError(
                f"{x.shape[1]} tokens with {self.num_prefix_tokens} prefix tokens do not fill a grid of "
                f"{height} x {width}; pass grid=(H, W) with H*W = {count}"
            )
        return height, width


def undecayed(model: nn.Module) -> set[str]:
    """Names, within a model, of the parameters of mechanisms that are not to decay; for `no_weight_decay`."""
    found = set()
    for place, module in model.named_modules():
        if isinstance(module, Attention):
            found |= {f"{place}.{name}".lstrip(".") for name in module.undecayed}
    return found & {name for name, _ in model.named_parameters()}


def four_axes(bias: Tensor) -> Tensor:
    """A bias with all axes (B, heads, queries, keys): like every broadcast, one may leave out the first ones."""
    while bias.dim() < 4:
        bias = bias.unsqueeze(0)
    return bias


def logit_bias(
    key_mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype, masked: float = MASKED
) -> Tensor | None:
    """What to add to logits (B, heads, queries, keys) for a key mask (B or 1, keys) and a bias; None for nothing."""
    if bias is not None:
        bias = four_axes(bias).to(dtype)
    if key_mask is None:
        return bias
    blocked = ~key_mask[:, None, None, :]
    if bias is None:
        return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, masked)
    return bias.masked_fill(blocked, masked)


def zero_without_keys(out: Tensor, key_mask: Tensor | None) -> Tensor:
    """`out` (B, heads, queries, ...) with zero for the images in which no key may be attended."""
    if key_mask is None:
        return out
    return out.masked_fill(~key_mask.any(dim=1)[:, None, None, None], 0.0)


def check_heads(name: str, dim: int, num_heads: int) -> int:
    """The width of one head.

    Raises:
        UsageError: `num_heads` does not divide `dim`, or there are no channels.
    """
    if num_heads < 1 or dim < 1 or dim % num_heads:
        divisors = [n for n in range(1, dim + 1) if dim % n == 0 and n <= 64]
        raise UsageError(f"attention {name!r}: num_heads={num_heads} does not divide {dim} channels; valid: {divisors}")
    return dim // num_heads
