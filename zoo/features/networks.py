"""What timm can make by name: whether it can, for which images, with which weights."""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn

from zoo.errors import UsageError, unknown

# What timm's networks raise over an option, a size or weights that do not fit.
BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError, IndexError)


def check_backbone_name(name: str) -> None:
    """Raises UsageError, with the closest names, unless timm can make `name`."""
    if name.partition(":")[0] in ("hf-hub", "local-dir") and ":" in name:
        return
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models())


def own_size(name: str) -> tuple[int, int]:
    """Height and width that a backbone was made for.

    Raises:
        UsageError: timm cannot make it.
    """
    check_backbone_name(name)
    config = get_pretrained_cfg(name)
    return (int(config.input_size[1]), int(config.input_size[2])) if config is not None else (224, 224)


def wants_size(name: str) -> bool:
    """Whether a network is told the size of the images: those made for one, and ours, whose tables then fit it.

    timm's flexible networks are left to their own: few of their filters resize what pretrained files hold.
    """
    config = get_pretrained_cfg(name)
    return name.startswith("zoo_") or (config is not None and config.fixed_input_size)


def checked_size(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """A side, or (height, width), as the latter.

    Raises:
        UsageError: it is neither.
    """
    if img_size is None:
        return None
    size = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise UsageError(f"img_size={img_size}: give a positive side, or (height, width)")
    return size[0], size[1]


def checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a network, as they are.

    Raises:
        UsageError: among them is what has an argument of its own.
    """
    found = dict(options or {})
    taken = sorted(found.keys() & {"in_chans", "img_size", "pretrained", "features_only", "out_indices"})
    if taken:
        raise UsageError(f"backbone_options holds {', '.join(taken)}: in_chans, img_size, pretrained and levels say it")
    return found


def build(name: str, **arguments: Any) -> Any:
    """`timm.create_model`, whose errors become a UsageError."""
    try:
        return timm.create_model(name, **arguments)
    except UsageError:
        raise
    except BUILD_ERRORS as error:
        shown = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        raise UsageError(f"backbone {name!r} gives no maps with {shown}: {short(error)}") from error


def short(error: Exception, limit: int = 400) -> str:
    """The text of an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def weightless(name: str, arguments: Mapping[str, Any]) -> Any:
    """The network without weights, to look at."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except UsageError:
        raise
    except Exception:
        # Some look at the values of a tensor while they are made; the second error is the one to tell.
        return build(name, **arguments)


def level_infos(network: Any, name: str) -> list[dict[str, Any]]:
    """Channels and reduction of every level of a network, in timm's words.

    Raises:
        UsageError: timm knows none.
    """
    infos = getattr(network, "feature_info", None)
    infos = list(getattr(infos, "info", infos) or [])
    if not infos or not all("reduction" in info and "num_chs" in info for info in infos):
        raise UsageError(f"backbone {name!r} gives no maps: timm knows no levels of it. Choose another one")
    return infos


def size_arguments(name: str, network: type, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a network wants to be told so that it takes images of `size`, and of others where it can."""
    known = _parameters(network)
    arguments: dict[str, Any] = {}
    if size is not None and wants_size(name):
        arguments["img_size"] = size
    for option, value in (("dynamic_img_size", True), ("dynamic_img_pad", True), ("strict_img_size", False)):
        if option in known:
            arguments[option] = value
    return arguments


def _parameters(network: type) -> set[str]:
    """Names of a class's arguments, those that it hands on to its bases included."""
    found: set[str] = set()
    for base in network.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = signature(base.__init__).parameters.values()
        found |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def weight_arguments(pretrained: bool | str | Path | Mapping[str, Tensor]) -> dict[str, Any]:
    """What timm wants to be told to load weights: its own, a file's, or given ones.

    Raises:
        UsageError: there is no such file.
    """
    if isinstance(pretrained, bool):
        return {"pretrained": pretrained}
    if isinstance(pretrained, Mapping):
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(pretrained)}}
    if not Path(pretrained).is_file():
        raise UsageError(f"there is no weights file at {pretrained}")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained)}}


def check_loaded(network: nn.Module, name: str, source: Mapping[str, Any]) -> None:
    """Raises UsageError unless most of a network's weights came out of a file.

    timm loads what is asked for maps loosely: a file of another network would leave it as it was, in silence. Filters
    rename and reshape, so values are looked for, not names.
    """
    network.pretrained_cfg.pop("state_dict", None)
    given = source.get("state_dict") or {}
    if "file" in source and not source["file"].endswith((".npz", ".npy")):
        given = load_state_dict(source["file"], weights_only=True)
    found = {_fingerprint(value) for value in given.values() if isinstance(value, Tensor) and value.ndim >= 2}
    own = [_fingerprint(parameter) for parameter in network.parameters() if parameter.ndim >= 2]
    count = sum(value in found for value in own)
    if given and 2 * count < len(own):
        raise UsageError(
            f"the weights do not fit backbone {name!r}: of its {len(own)} matrices and kernels only {count} are in "
            f"{source.get('file', 'them')}. Give the backbone and options that they were made with"
        )


def _fingerprint(value: Tensor) -> tuple[int, float]:
    flat = value.detach().float().flatten()
    return flat.numel(), float(flat[:64].double().sum()) if flat.numel() else 0.0
