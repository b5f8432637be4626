"""Reads files of whole segmentation networks."""

import pickle
from collections.abc import Mapping
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from zoo.errors import UsageError


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The weights in a torch or safetensors file, bare or wrapped as training programs do.

    Raises:
        UsageError: there is no such file, it is damaged, or opening it could run code.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no weights file at {path}")
    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is no file of weights, or pickles more than tensors, so that opening it could run code. If you "
            "trust where it comes from, turn it into safetensors: python tools/convert_checkpoint.py FILE --trust (in "
            "the project's repository)"
        ) from error
    except Exception as error:
        # A cut or foreign file surfaces as RuntimeError, EOFError, KeyError, SafetensorError ...
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{path} is damaged or no file of weights: {text}") from error


def load(network: nn.Module, state: Mapping[str, Tensor], ignore: tuple[str, ...], source: object) -> None:
    """Loads a state strictly, but for missing entries whose names begin as in `ignore`.

    Raises:
        UsageError: entries are missing, too many or of other shapes; names some.
    """
    own = network.state_dict()
    found = {key: value for key, value in state.items() if not (key.startswith(ignore) and key not in own)}
    lacking = [key for key in own if key not in found and not key.startswith(ignore)]
    problems = [
        ("lacks", [key for key in lacking if not key.endswith("num_batches_tracked")]),
        ("brings", [key for key in found if key not in own]),
        ("has another shape of", [key for key in found if key in own and found[key].shape != own[key].shape]),
    ]
    texts = [f"{verb} {_some(keys)}" for verb, keys in problems if keys]
    if texts:
        raise UsageError(
            f"the weights in {source} do not fit this network: the file {'; it '.join(texts)}. Give the head, "
            "backbone, number of classes and options that it was made with"
        )
    network.load_state_dict(found, strict=False)


def _some(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
