"""What every backbone needs to be built through timm and to read a weights file."""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.errors import UsageError


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """The facts that timm keeps about a network and its weights, of 1,000 classes at 224 pixels unless given."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **kwargs,
    }


# Where training programs put the weights inside a file, best first as timm reads them: averaged before raw ones.
CHECKPOINT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
Filter = Callable[[Mapping[str, Any], Any], dict[str, Tensor]]


class UnfitWeightsError(UsageError):
    """A file's weights are those of another network; `problem` says which are there and which are missing."""

    def __init__(self, variant: str, problem: str):
        super().__init__(
            f"the weights do not fit {variant}: {problem}. Give the name, attention and options they were made with."
        )
        self.problem = problem


def build(
    cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Filter,
    *,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    **kwargs: Any,
) -> Any:
    """timm's `build_model_with_cfg` for networks that give their maps themselves.

    Args:
        filter_fn: turns the content of a file into a state of the network.
        out_indices: maps of a `features_only` network.
        kwargs: of the network, and timm's own.

    Raises:
        UsageError: the weights file pickles more than tensors, so that opening it could run code, is none at all, or
            holds the weights of another network.
    """

    def fitted(content: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
        state = filter_fn(content, model)
        for place, module in model.named_modules():
            if isinstance(module, Attention):
                module.complete(state, f"{place}.")
        # timm loads a file with another classifier loosely: what else does not fit would be left out in silence.
        problem = unfit(state, model)
        if problem:
            raise UnfitWeightsError(variant, problem)
        return state

    try:
        return build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_filter_fn=fitted,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **kwargs,
        )
    except AttributeError as error:
        # timm asks whatever it has opened for its items.
        if error.name != "items":
            raise
        raise UsageError(
            f"the weights file for {variant} holds a {type(error.obj).__name__}, no weights by name"
        ) from error
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


def unfit(state: Mapping[str, Tensor], model: Any) -> str:
    """Which weights `state` lacks and brings, besides the classifier's, in words; "" if it fits."""
    classifiers = model.pretrained_cfg["classifier"]
    heads = tuple(
        f"{name.partition('.')[0]}." for name in ((classifiers,) if isinstance(classifiers, str) else classifiers)
    )
    # Files of networks older than BatchNorm's counters do without them, and torch fills them in.
    own = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    found = {key for key in state if not key.endswith("num_batches_tracked")}
    parts = []
    for verb, keys in (("lack", own - found), ("bring", found - own)):
        names = sorted(key for key in keys if not key.startswith(heads))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"they {verb} {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a released checkpoint: bare, or under the first of CHECKPOINT_KEYS."""
    for key in CHECKPOINT_KEYS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def fit_positions(
    table: Tensor, model: Any, grid_size: tuple[int, int], num_prefix_tokens: int, patch_size: Sequence[int]
) -> Tensor:
    """A file's table of positions (1, P + h*w, C), resized to `grid_size`.

    h x w is what the config's `input_size` gives with the file's `patch_size`, where that fits, else `grid_size`, else
    a square.

    Raises:
        UsageError: none of them fits.
    """
    count = table.shape[1] - num_prefix_tokens
    size = model.pretrained_cfg["input_size"][-2:]
    side = math.isqrt(max(count, 0))
    told = tuple(-(-length // patch) for length, patch in zip(size, patch_size, strict=True))
    grid = next((found for found in (told, tuple(grid_size), (side, side)) if math.prod(found) == count), None)
    if grid is None:
        raise UsageError(
            f"the file's table of positions has {count} places, which is no square; say for which image size it was "
            "made: pretrained_cfg_overlay={'file': PATH, 'input_size': (3, HEIGHT, WIDTH)}"
        )
    if grid == tuple(grid_size):
        return table
    return resample_abs_pos_embed(table, list(grid_size), list(grid), num_prefix_tokens=num_prefix_tokens)
