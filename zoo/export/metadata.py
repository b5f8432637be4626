"""What an exported file says about itself: all that running it on pictures takes."""

import contextlib
import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timm
import torch

from zoo.errors import UsageError, unknown
from zoo.export.graphs import threshold_of

FORMAT = 1
# Of the data hyperparameters, with the values that timm's evaluation transform gives them when they are absent.
PREPROCESSING: dict[str, Any] = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# The colour of borders: timm's create_transform pads with ImageNet's mean unless told another one.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)


def preprocessing(data: Mapping[str, Any]) -> dict[str, Any]:
    """crop_pct, crop_mode and interpolation of evaluation, resolved as timm's create_transform resolves them.

    Args:
        data: hyperparameters of the data module; others than the three are passed over.

    Raises:
        UsageError: a value that evaluation cannot use.
    """
    given = {name: data[name] for name in PREPROCESSING if data.get(name) is not None}
    chosen = PREPROCESSING | given
    if chosen["interpolation"] == "random":
        chosen["interpolation"] = "bilinear"  # a draw per training image; evaluation has nothing to draw
    if chosen["interpolation"] not in INTERPOLATIONS:
        raise unknown("interpolation", chosen["interpolation"], INTERPOLATIONS)
    if chosen["crop_mode"] not in CROP_MODES:
        raise unknown("crop_mode", chosen["crop_mode"], CROP_MODES)
    if not 0 < float(chosen["crop_pct"]) <= 1:
        raise UsageError(f"crop_pct={chosen['crop_pct']}: it lies in (0, 1]")
    return chosen


def build_metadata(meta: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    """The entries `zoo.*` of an exported file; each value is text or JSON.

    Args:
        meta: what the task's `export_meta` returns.
        data: hyperparameters of the data module.
    """
    return {
        "zoo.format": str(FORMAT),
        "zoo.task": str(meta["task"]),
        "zoo.backbone": str(meta["backbone"]),
        "zoo.img_size": json.dumps([int(side) for side in meta["img_size"]]),
        "zoo.in_chans": str(int(meta["in_chans"])),
        "zoo.mean": json.dumps(list(meta["mean"])),
        "zoo.std": json.dumps(list(meta["std"])),
        **_OWN[meta["task"]](meta, data),
        "zoo.options": json.dumps({k: meta.get(k) for k in ("attn", "attn_options", "backbone_options")}),
        "zoo.versions": json.dumps(versions()),
    }


def _of_classification(meta: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    chosen = preprocessing(data)
    mean = _IMAGENET_MEAN if meta["in_chans"] == 3 else [sum(_IMAGENET_MEAN) / 3] * meta["in_chans"]
    return {
        "zoo.class_names": json.dumps(list(meta["class_names"]), ensure_ascii=False),
        "zoo.crop_pct": repr(float(chosen["crop_pct"])),
        "zoo.crop_mode": chosen["crop_mode"],
        "zoo.interpolation": chosen["interpolation"],
        "zoo.border_fill": json.dumps([round(255 * value) for value in mean]),
    }


def _of_anomaly_detection(meta: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    threshold = threshold_of(meta)
    pixels = float("nan") if meta.get("pixel_threshold") is None else float(meta["pixel_threshold"])
    tile = data.get("tile")
    return {
        "zoo.method": str(meta["method"]),
        "zoo.layers": json.dumps(meta.get("layers")),
        "zoo.threshold": repr(threshold),
        "zoo.pixel_threshold": repr(pixels if math.isfinite(pixels) else threshold),
        "zoo.resize": "stretch" if tile is not None else str(data.get("resize") or "stretch"),
        "zoo.tile": json.dumps(None if tile is None else int(tile)),
        "zoo.tile_overlap": json.dumps(None if tile is None else data.get("tile_overlap")),
    }


def _of_segmentation(meta: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    size = data.get("eval_size")
    return {
        "zoo.head": str(meta["head"]),
        "zoo.class_names": json.dumps(list(meta["class_names"]), ensure_ascii=False),
        "zoo.palette": json.dumps([list(colour) for colour in meta["palette"]]),
        "zoo.any_size": json.dumps(bool(meta["any_size"])),
        "zoo.window": json.dumps(meta["window"]),
        "zoo.window_overlap": json.dumps(meta["window_overlap"]),
        # Images are resized to it, as validation's were; null leaves them as they are.
        "zoo.eval_size": json.dumps([size, size] if isinstance(size, int) else size),
    }


_OWN = {
    "classification": _of_classification,
    "anomaly_detection": _of_anomaly_detection,
    "segmentation": _of_segmentation,
}


def versions() -> dict[str, str]:
    """Of everything that had a hand in the file and is installed."""
    import zoo

    found = {"attnzoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"python": platform.python_version()}
