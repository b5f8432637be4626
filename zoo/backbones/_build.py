"""Builds a backbone through timm, so that a refused weights file says what to do about it."""

import pickle
from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from zoo.errors import UsageError


def build(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`.

    Raises:
        UsageError: the weights file pickles more than tensors, so that opening it could run code.
    """
    try:
        return build_model_with_cfg(cls, variant, pretrained, **kwargs)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # timm words the refusal anew, as a RuntimeError caused by torch's.
        if not isinstance(error, pickle.UnpicklingError) and not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UsageError(
            f"the weights file for {variant} pickles more than tensors, and opening it could run code; it is refused. "
            "If you trust its origin, turn it into safetensors: python tools/convert_checkpoint.py FILE --trust"
        ) from error


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a released checkpoint: bare, or under `model`, `state_dict`, `model_ema`, `state_dict_ema`."""
    for key in ("model", "state_dict", "model_ema", "state_dict_ema", "module"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {key.removeprefix("module."): value for key, value in state_dict.items()}
