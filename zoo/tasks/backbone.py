"""Makes the backbone of a task through timm, and loads weights into it strictly."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from zoo.backbones import UnfitWeightsError  # importing it registers the zoo_* names with timm
from zoo.errors import UsageError
from zoo.features import BUILD_ERRORS, check_backbone_name, short, wants_size
from zoo.features import own_size as own_size
from zoo.tasks.weights import read_weights


def create_backbone(
    name: str,
    *,
    num_classes: int,
    img_size: tuple[int, int],
    in_chans: int = 3,
    attn: str | Sequence[str | None] | None = None,
    attn_options: Mapping | Sequence | None = None,
    options: Mapping[str, Any] | None = None,
    pretrained: bool | str = False,
) -> nn.Module:
    """A timm model that answers (B, in_chans, *img_size) with (B, num_classes).

    Args:
        pretrained: False, True (timm's own weights for this name), or the path of a weights file: safetensors, torch
            (weights only) or a checkpoint of a run. A file whose head has another number of classes gets a new head;
            everything else has to fit.

    Raises:
        UsageError: the name, an option, the size or the weights do not fit; says which.
    """
    check_backbone_name(name)
    arguments = dict(options or {})
    taken = sorted(set(arguments) & {"num_classes", "in_chans", "img_size", "pretrained", "attn", "attn_options"})
    if taken:
        raise UsageError(f"backbone_options holds {', '.join(taken)}; give it as an argument of the task instead")
    arguments["in_chans"] = in_chans
    if attn is not None:
        arguments["attn"] = attn
    if attn_options is not None:
        arguments["attn_options"] = attn_options
    if wants_size(name):
        arguments["img_size"] = img_size
    if isinstance(pretrained, str):
        model = _with_weights(name, num_classes, arguments, Path(pretrained))
    else:
        model = _build(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    _check_forward(name, model, num_classes, in_chans, img_size)
    return model


def head_parameters(backbone: nn.Module) -> set[int]:
    """Ids of the parameters of the classifier, the part that a freeze leaves trainable."""
    classifier = backbone.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    return {id(parameter) for head in heads for parameter in head.parameters()}


def _build(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except UsageError:
        raise
    except BUILD_ERRORS as error:
        raise _explained(name, arguments, error) from error


def _explained(name: str, arguments: Mapping[str, Any], error: Exception) -> UsageError:
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match and match[1] in ("attn", "attn_options"):
        return UsageError(
            f"backbone {name!r} has no exchangeable attention ({match[1]}). Those that have one: `zoo list backbones`."
        )
    if match:
        return UsageError(f"backbone {name!r} takes no option {match[1]!r} (given in backbone_options)")
    if "No pretrained weights" in str(error):
        return UsageError(
            f"there are no downloadable weights for {name!r}; give the path of a weights file as pretrained, or false"
        )
    given = {k: v for k, v in arguments.items() if not k.startswith("pretrained")}
    return UsageError(f"backbone {name!r} cannot be made with {given}: {short(error)}")


def _with_weights(name: str, num_classes: int, arguments: Mapping[str, Any], path: Path) -> nn.Module:
    """Builds with the file's own number of classes, so that every key is checked, and exchanges the head after."""
    state = read_weights(path)
    found = _classes_in(name, state)
    config = get_pretrained_cfg(name)
    # A file whose classifier goes by another name is renamed by the backbone's own filter: only trying can tell.
    candidates = [found] if found is not None else list(dict.fromkeys([config.num_classes if config else 1000, 0]))
    failures: list[Exception] = []
    for classes in candidates:
        try:
            model = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": dict(state), "num_classes": classes, "label_offset": 0},
                num_classes=classes,
                **arguments,
            )
            break
        except UnfitWeightsError as error:
            failures.append(ValueError(error.problem))
        except UsageError:
            raise
        except BUILD_ERRORS as error:
            if "unexpected keyword argument" in str(error):
                raise _explained(name, arguments, error) from error
            failures.append(error)
    else:
        raise UsageError(
            f"the weights in {path} do not fit backbone {name!r}: {short(failures[0])}. "
            "Give the backbone, attention and options that the file was made with."
        ) from failures[0]
    model.pretrained_cfg.pop("state_dict", None)
    if classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _classes_in(name: str, state: Mapping[str, Tensor]) -> int | None:
    config = get_pretrained_cfg(name)
    classifier = config.classifier if config is not None else None
    for key in (classifier,) if isinstance(classifier, str) else tuple(classifier or ()):
        weight = state.get(f"{key}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None


def _check_forward(name: str, model: nn.Module, num_classes: int, in_chans: int, img_size: tuple[int, int]) -> None:
    # One image through the network costs milliseconds and turns a size that some layer cannot take into a sentence
    # before any data is read.
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(torch.zeros(1, in_chans, *img_size))
    except UsageError:
        raise
    except BUILD_ERRORS as error:
        raise UsageError(
            f"backbone {name!r} cannot take images of {img_size[0]} x {img_size[1]}: {short(error)}. "
            "Give another img_size."
        ) from error
    model.train(training)
    if not isinstance(out, Tensor) or out.shape != (1, num_classes):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"backbone {name!r} is no classifier: it answers {shape} where (1, {num_classes}) is needed")
