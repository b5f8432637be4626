"""Turns the entries of a released file of a pyramid into those of our network."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from zoo.backbones._build import fit_positions


def rename(state: Mapping[str, Tensor], rules: Mapping[str, str | Callable[[re.Match[str]], str]]) -> dict[str, Tensor]:
    """The state with every regular expression of `rules` replaced in its keys, in order."""
    out = {}
    for key, value in state.items():
        for pattern, text in rules.items():
            key = re.sub(pattern, text, key)
        out[key] = value
    return out


def stage_of(prefix: str, suffix: str = "", shift: int = -1) -> Callable[[re.Match[str]], str]:
    """Replacement for a match whose first group is the number of a stage."""
    return lambda match: f"{prefix}{int(match[1]) + shift}{suffix}"


def fit(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state whose keys are ours as far as stages go, in the form that this model has: windows, joint qkv, tables."""
    own = model.state_dict()
    out = {}
    for key, value in state.items():
        # What a network computes for itself is never taken from a file.
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        inner = key.replace(".attn.", ".attn.inner.", 1)
        out[inner if key not in own and inner in own else key] = value
    for key in [key for key in out if ".attn.q." in key]:
        joint, kv = key.replace(".q.", ".qkv."), key.replace(".q.", ".kv.")
        if joint in own and kv in out:
            out[joint] = torch.cat([out.pop(key), out.pop(kv)])
    return {key: _resized(key, value, own[key], model) if key in own else value for key, value in out.items()}


def _resized(key: str, value: Tensor, own: Tensor, model: nn.Module) -> Tensor:
    """Positions and patches for another size."""
    module: Any = model.get_submodule(key.rpartition(".")[0])
    # Tables of two grids can have the same number of places: these look at the grids, not at the shape.
    if key.endswith("positional_encoding"):
        return fit_positions(value, model, module.grid_size, 0, _strides(key, model))
    if key.endswith("pos_embed"):
        return fit_positions(value, model, module.resize_pos.grid_size, 0, _strides(key, model))
    if value.shape == own.shape:
        return value
    if key.endswith("relative_position_bias_table"):
        return resize_rel_pos_bias_table(value, new_window_size=module.window_size, new_bias_shape=own.shape)
    if key == "patch_embed.proj.weight" and value.shape[2:] != own.shape[2:]:
        return resample_patch_embed(value, list(own.shape[2:]), interpolation="bicubic", antialias=True)
    return value


def _strides(key: str, model: Any) -> tuple[int, int]:
    """Pixels between the places of the stage that `key` belongs to, along each side."""
    stage = int(key.split(".")[1])
    return (model.feature_info[stage]["reduction"],) * 2
