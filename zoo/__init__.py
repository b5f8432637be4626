"""Vision models that share one attention registry; `import zoo` registers every `zoo_*` backbone with timm."""

import importlib

from zoo import backbones, kernels

# At once, not lazily: a submodule imported first would take the name of its function.
from zoo.accelerate import accelerate
from zoo.attention import attention_spec, create_attention, list_attentions, register_attention
from zoo.features import FeaturePyramid

__version__ = "0.1.0"
__all__ = [
    "FeaturePyramid",
    "accelerate",
    "attention_spec",
    "backbones",
    "create_attention",
    "kernels",
    "list_attentions",
    "register_attention",
]

# Rooms that pull in lightning, onnx or albumentations load on first use, so that `import zoo` stays light.
_LAZY = ("data", "export", "heads", "metrics", "tasks")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
