"""The cases of whole networks, and the headlines: a paper's ratio of two networks beside ours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.bench.cases import Elsewhere, NetworkCase, Unavailable, register

# By the maintainers, with the authors' own code: bfloat16, channels-last, batches as in these cases.
SOURCE = "measured elsewhere on one H100 80GB HBM3, torch 2.11.0, timm 1.0.31, 2026-11-22"


def create(name: str, sized: bool, size: int, **options: Any) -> nn.Module:
    """A network by timm's registry, with equal weights every time; `sized`: it wants to know its img_size."""
    import timm

    if name.startswith("zoo_"):
        import zoo  # noqa: F401

    if not timm.is_model(name):
        raise Unavailable(f"timm {timm.__version__} knows no network {name}")
    torch.manual_seed(0)
    network = timm.create_model(name, **({"img_size": size} if sized else {}), **options)
    wake(network)
    return network


def wake(network: nn.Module) -> None:
    """Gives branches that start at zero (last norms, layer scales) a weight: else a wrong one would show nowhere."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() and parameter.squeeze().ndim == 1 and parameter.abs().max() < 1e-3:
                parameter.uniform_(0.1, 0.5)


def network(name: str, sized: bool = False) -> Callable[[int], nn.Module]:
    return partial(create, name, sized)


def accelerated(name: str, size: int) -> nn.Module:
    import zoo

    return zoo.accelerate(create(name, False, size))


def add(name: str, ours: Callable[[int], nn.Module] | None, **facts: Any) -> None:
    facts.setdefault("ours_name", name)
    register(NetworkCase(name, facts.pop("kind", "network"), facts.pop("title", name), ours, **facts))


# A network that is timm's own and stays so: shows whether this machine runs as the others did.
add("resnet50", None, title="timm resnet50 (yardstick)", peer=network("resnet50"), peer_name="timm", ours_name="-")
add(
    "zoo_shvit_s4",
    network("zoo_shvit_s4"),
    peer=network("shvit_s4"),
    peer_name="timm shvit_s4",
    img_size=256,
    quick_size=128,
)
add(
    "zoo_shvit_s4_batch1024",
    network("zoo_shvit_s4"),
    title="zoo_shvit_s4, batch 1024",
    peer=network("shvit_s4"),
    peer_name="timm shvit_s4",
    img_size=256,
    quick_size=128,
    passes=("training",),
    training_batch=1024,
)
add(
    "zoo_uniformer_small",
    network("zoo_uniformer_small"),
    quick_size=32,
    elsewhere=Elsewhere(
        "the authors' UniFormer-S",
        "H100",
        SOURCE,
        {"inference": {"eager": 4849, "compile": 12887}, "training": {"eager": 1663, "compile": 2298}},
        {"inference": {"eager": 1.6, "compile": 1.1}, "training": {"eager": 8.5, "compile": 8.1}},
    ),
)
add(
    "zoo_flatten_swin_tiny",
    network("zoo_flatten_swin_tiny", sized=True),
    quick_size=64,
    elsewhere=Elsewhere(
        "the authors' FLatten-Swin-T",
        "H100",
        SOURCE,
        {"inference": {"eager": 4291, "compile": 11559}, "training": {"eager": 1266, "compile": 3599}},
        {"inference": {"eager": 3.6, "compile": 1.8}, "training": {"eager": 12.3, "compile": 8.2}},
    ),
)
add(
    "zoo_halonet_h1",
    network("zoo_halonet_h1"),
    peer=network("halonet_h1"),
    peer_name="timm halonet_h1",
    img_size=256,
    quick_size=128,
    note="timm's halonet_h1 has the same widths and depths, but 8 heads in its first stage and a norm after attention.",
)
add(
    "halonet50ts_accelerated",
    partial(accelerated, "halonet50ts"),
    title="zoo.accelerate(timm halonet50ts)",
    ours_name="accelerated",
    peer=network("halonet50ts"),
    peer_name="timm halonet50ts",
    reference=network("halonet50ts"),
    img_size=256,
    quick_size=256,
)
add(
    "lambda_resnet26t_accelerated",
    partial(accelerated, "lambda_resnet26t"),
    title="zoo.accelerate(timm lambda_resnet26t)",
    ours_name="accelerated",
    peer=network("lambda_resnet26t"),
    peer_name="timm lambda_resnet26t",
    reference=network("lambda_resnet26t"),
    img_size=256,
    note="timm's lambda layers refuse channels-last maps: timm lambda_resnet26t runs with ordinary ones.",
)
add(
    "zoo_vit_base_cb_patch16_224",
    network("zoo_vit_base_cb_patch16_224", sized=True),
    peer=network("vit_base_patch16_224", sized=True),
    peer_name="timm vit_base_patch16_224 (without CB)",
    quick_size=32,
)

# Headlines: inference alone, as the papers have it.
add(
    "headline_shvit_s4",
    network("zoo_shvit_s4"),
    kind="headline",
    title="SHViT-S4 against MobileViTv2-1.0, both at 256x256",
    ours_name="zoo_shvit_s4",
    peer=network("mobilevitv2_100"),
    peer_name="timm mobilevitv2_100",
    img_size=256,
    passes=("inference",),
    claim="3.3x (arXiv 2401.16456)",
)
add(
    "headline_lambda_resnet50",
    network("zoo_lambda_resnet50", sized=True),
    kind="headline",
    title="LambdaResNet-50 at 224x224 (78.4 % as published) against EfficientNet-B1 at 240x240",
    ours_name="zoo_lambda_resnet50",
    peer=network("efficientnet_b1"),
    peer_name="timm efficientnet_b1",
    img_size=224,
    peer_img_size=240,
    passes=("inference",),
    claim="3.2x to 4.4x for the family, at like accuracy (arXiv 2102.08602)",
)
