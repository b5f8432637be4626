"""Reads files of weights without ever running code from them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor

from zoo.backbones import CHECKPOINT_KEYS
from zoo.errors import UsageError


def read_file(path: str | Path) -> Any:
    """Contents of a torch or safetensors file, on the CPU.

    Raises:
        UsageError: there is no such file, it is damaged, or it pickles anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no weights file or checkpoint at {path}")
    if path.suffix == ".onnx":
        raise UsageError(f"{path} is an exported network; give the checkpoint that it was made from (best.ckpt)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise UsageError(
                f"{path} pickles more than tensors and plain values, and opening it could run code; it is refused. "
                "If you trust where it comes from, turn it into safetensors: python tools/convert_checkpoint.py FILE "
                "--trust (in the project's repository)"
            ) from error
        raise UsageError(f"{path} is damaged or no file of weights: {_first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        # A cut or foreign file surfaces as RuntimeError, EOFError, KeyError, UnicodeDecodeError, SafetensorError ...
        raise UsageError(f"{path} is damaged or no file of weights: {_first_line(error)}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a backbone out of a bare state dict, a training file, or a checkpoint of a run.

    Raises:
        UsageError: as `read_file`, or nothing in the file looks like weights.
    """
    content = read_file(path)
    if isinstance(content, Mapping):
        for key in CHECKPOINT_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    weights = {}
    if isinstance(content, Mapping):
        weights = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not weights:
        raise UsageError(f"{path} holds no weights (no tensors by name)")
    weights = clean_state_dict(weights)
    if any(key.startswith("backbone.") for key in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    return weights


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
