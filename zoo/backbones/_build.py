"""What every backbone needs to be built through timm and to read a weights file."""

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from zoo.errors import UsageError


def build(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`.

    Raises:
        UsageError: the weights file pickles more than tensors, so that opening it could run code, or is none at all.
    """
    try:
        return build_model_with_cfg(cls, variant, pretrained, **kwargs)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # timm wraps torch's refusal in a RuntimeError that advises to turn the protection off.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (pickle.UnpicklingError, EOFError)):
            raise
        trust = (
            "If you trust its origin, turn it into safetensors: python tools/convert_checkpoint.py FILE --trust "
            "(in the project's repository)"
        )
        # What torch says of bytes that are no pickle of its own, a web page for instance.
        if isinstance(cause, EOFError) or "Unsupported operand" in str(cause):
            raise UsageError(
                f"the weights file for {variant} is damaged, no weights file at all (a web page?) or a pickle of "
                f"another kind, which could run code; it is refused. Get it again. {trust}"
            ) from error
        raise UsageError(
            f"the weights file for {variant} pickles more than tensors, and opening it could run code; it is refused. "
            f"{trust}"
        ) from error


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a released checkpoint: bare, or under `model`, `state_dict`, `model_ema`, `state_dict_ema`."""
    for key in ("model", "state_dict", "model_ema", "state_dict_ema", "module"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def fit_positions(
    table: Tensor, model: Any, grid_size: tuple[int, int], num_prefix_tokens: int, patch_size: Sequence[int]
) -> Tensor:
    """A file's table of positions (1, P + h*w, C), resized to `grid_size`.

    h x w is what the config's `input_size` gives with the file's `patch_size`, where that fits, else a square, else the
    model's own grid.

    Raises:
        UsageError: none of them fits.
    """
    count = table.shape[1] - num_prefix_tokens
    size = model.pretrained_cfg["input_size"][-2:]
    side = math.isqrt(max(count, 0))
    candidates = [tuple(-(-length // patch) for length, patch in zip(size, patch_size, strict=True)), (side, side)]
    grid = next((found for found in [*candidates, tuple(grid_size)] if math.prod(found) == count), None)
    if grid is None:
        raise UsageError(
            f"the file's table of positions has {count} places, which is no square; say for which image size it was "
            "made: pretrained_cfg_overlay={'file': PATH, 'input_size': (3, HEIGHT, WIDTH)}"
        )
    if grid == tuple(grid_size):
        return table
    return resample_abs_pos_embed(table, list(grid_size), list(grid), num_prefix_tokens=num_prefix_tokens)
