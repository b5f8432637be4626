"""What there is: backbones with the facts that the command line and the documentation show."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo.backbones  # noqa: F401  (registers the zoo_* names with timm)
from zoo.attention import Attention, list_attentions
from zoo.attention.registry import attention_spec
from zoo.errors import unknown
from zoo.kernels.dispatch import standing_for


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a backbone with its default options.

    Attributes:
        parameters: number of them, classifier included.
        macs: multiply-adds of one image of `input_size`, convolutions and matrix products, those of the attention
            included; None where it cannot be counted.
        input_size: (channels, height, width).
        attention: names of the registered mechanisms inside, in order of appearance.
    """

    name: str
    parameters: int
    macs: float | None
    input_size: tuple[int, int, int]
    attention: tuple[str, ...]
    paper: str | None
    licence: str | None
    weights: str


def match(pattern: str | None, names: Iterable[str]) -> list[str]:
    """The names that fit an fnmatch pattern, sorted; a pattern without wildcards fits anywhere in the name."""
    if pattern is None:
        return sorted(names)
    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return sorted(fnmatch.filter(names, pattern))


def list_backbones(pattern: str | None = None) -> list[str]:
    """Names of our backbones that fit a pattern."""
    return match(pattern, timm.list_models("zoo_*"))


def short_facts(name: str) -> tuple[str, str, str]:
    """Paper, input size and licence of a backbone, without building it."""
    config = get_pretrained_cfg(name)
    if config is None:
        return "-", "-", "-"
    size = " x ".join(str(side) for side in config.input_size[1:])
    return _paper(config) or "-", size, config.license or "-"


def backbone_facts(name: str) -> BackboneFacts:
    """Builds a backbone without its weights and counts.

    Raises:
        UsageError: timm knows no such name; the closest are given.
    """
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models())
    model = _build(name)
    config = get_pretrained_cfg(name)
    input_size = tuple(model.pretrained_cfg["input_size"])  # type: ignore[index]
    return BackboneFacts(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, input_size),
        input_size=input_size,
        attention=attentions_in(model),
        paper=_paper(config),
        licence=config.license if config is not None else None,
        weights=_weights(name),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> float | None:
    """Multiply-adds of one image (channels, height, width), on the device and in the mode of `model`."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    # The math path is made of matrix products that the counter knows; the fused ones differ from device to device.
    # So are the references of our kernels, of which the counter knows nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), standing_for("reference"), counter:
        try:
            model(torch.zeros(1, *input_size, device=device))
        except (NotImplementedError, RuntimeError):
            return None
    return counter.get_total_flops() / 2


def attentions_in(model: nn.Module) -> tuple[str, ...]:
    """Names of the registered mechanisms that a model contains, in order of appearance."""
    names = {attention_spec(name).cls: name for name in list_attentions()}
    found = [names[type(m)] for m in model.modules() if isinstance(m, Attention) and type(m) in names]
    return tuple(dict.fromkeys(found))


# Networks that take any mechanism: what timm builds, with which arguments. Small, but with the networks' numbers of
# heads; real numbers start faster than those of the meta device.
_SIZE: dict[str, Any] = {"img_size": 64, "num_classes": 5}
_VIT: dict[str, Any] = {**_SIZE, "depth": 1, "embed_dim": 48}
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("zoo_vit_tiny_patch16_224", _VIT),
    "vit without class token": ("zoo_vit_tiny_patch16_224", {**_VIT, "class_token": False, "global_pool": "avg"}),
    "attention_resnet": (
        "zoo_attention_resnet50",
        {**_SIZE, "widths": (32,), "depths": (1,), "num_heads": (8,), "mixers": ("softmax",)},
    ),
    "swin windows": (
        "zoo_swin_tiny_patch4_window7_224",
        {**_SIZE, "embed_dim": 24, "depths": (2,), "num_heads": (3,)},
    ),
}


def create_host(host: str, attn: str, **options: Any) -> nn.Module:
    """The small network `host` of `HOSTS` with a mechanism in all places that attend, in Swin inside of its windows.

    Args:
        host: a key of `HOSTS`.
        attn: name of the mechanism.
        options: further arguments of the network, over those of `HOSTS`.

    Raises:
        UsageError: the mechanism does not work there; the message says why.
    """
    name, own = HOSTS[host]
    if host == "swin windows" and not attention_spec(attn).wrapper:
        options = {"attn": "shifted_window", "attn_options": {"inner": attn}, **options}
    return timm.create_model(name, **{"attn": attn, **own, **options})


def refusals(attn: str) -> dict[str, str | None]:
    """Why each host of `HOSTS` refuses a mechanism, by the host's name; None where it works.

    The tests train and evaluate every mechanism in every host that does not refuse it.
    """
    found: dict[str, str | None] = {}
    for host in HOSTS:
        try:
            with torch.no_grad():
                create_host(host, attn).eval()(torch.zeros(1, 3, 64, 64))
            found[host] = None
        except ValueError as error:  # some know only with the grid before them
            found[host] = str(error)
    return found


def hosts_of(attn: str) -> str:
    """The hosts in which a mechanism works, in words; the ViT without class token where only that works."""
    works = [host for host, refusal in refusals(attn).items() if refusal is None]
    return ", ".join(host for host in works if not ("vit" in works and host == "vit without class token")) or "none"


def _build(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name).eval()
    except (NotImplementedError, RuntimeError):
        # Some constructors read values of the tensors they make, which a meta tensor does not have.
        return timm.create_model(name).eval()


def _paper(config) -> str | None:
    if config is None or not (config.paper_name or config.paper_ids):
        return None
    ids = config.paper_ids or ()
    ids = (ids,) if isinstance(ids, str) else tuple(ids)
    return ", ".join(part for part in (config.paper_name, *ids) if part)


def _weights(name: str) -> str:
    config = get_pretrained_cfg(name)
    origin = f"; from {config.origin_url}" if config is not None and config.origin_url else ""
    if config is not None and (config.url or config.file or config.hf_hub_id):
        return f"downloaded on demand (pretrained=True){origin}"
    return f"from a file (pretrained=True, pretrained_cfg_overlay={{'file': PATH}}){origin}"
