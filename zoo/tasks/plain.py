"""Hyperparameters in the few types that a checkpoint may hold."""

import enum
import os
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The same value in str, numbers, bool, None, list and dict, which weights_only loading accepts.

    Raises:
        TypeError: the value has no such form.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return plain(value.item())
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if isinstance(value, (str, int, float)):
        return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))
    raise TypeError(f"a hyperparameter cannot be of type {type(value).__name__}: {value!r}")
