"""`zoo.accelerate(model)`: timm's own halo, lambda and bottleneck attention made fast inside an existing model."""

import warnings
from typing import Any

from timm.layers import bottleneck_attn, halo_attn, lambda_layer
from torch import nn

from zoo.layers.timm_attention import FastBottleneckAttn, FastHaloAttn, FastLambdaLayer

__all__ = ["accelerate"]

# timm's class -> ours, and the child whose parameters ours reads without calling it.
_FASTER: dict[type[nn.Module], tuple[Any, str, type[nn.Module]]] = {
    halo_attn.HaloAttn: (FastHaloAttn, "pos_embed", halo_attn.PosEmbedRel),
    lambda_layer.LambdaLayer: (FastLambdaLayer, "conv_lambda", nn.Conv3d),
    bottleneck_attn.BottleneckAttn: (FastBottleneckAttn, "pos_embed", bottleneck_attn.PosEmbedRel),
}
_TIMM = tuple(_FASTER)
_OURS = (FastHaloAttn, FastLambdaLayer, FastBottleneckAttn)


def accelerate(model: nn.Module) -> nn.Module:
    """Makes timm's HaloAttn, LambdaLayer and BottleneckAttn layers of a model fast, in place, and returns the model.

    The layers keep their parameters, names, state_dict keys, `requires_grad`, train or eval mode, dtype and device;
    their answers differ by rounding alone. Besides, they take channels-last maps and maps of any size; a table of
    positions that belongs to one size is resized to others. Model and layers remain the same objects, so optimizers
    and hooks stay attached. Hooks on a layer and on its projections, norms and pooling run as before; hooks that are
    put later on its `pos_embed` or `conv_lambda` do not, since only the parameters of these are used. Calling it again
    changes nothing. Accelerate before torch.jit, torch.fx or torch.export, whose graphs hold no such layers any more.
    An accelerated layer can be compiled, traced and exported, but not scripted.

    What may mean something else is left as it is, and a warning names it: a subclass of timm's layers, a layer whose
    own `forward` was replaced, and one with a foreign or hooked `pos_embed` or `conv_lambda`, or a `conv_lambda` that
    does more than timm's, padding in a circle for instance.

    Args:
        model: any module, timm's or one that holds timm's; on any device, the meta device included.

    Returns:
        `model` itself; when it has no such layers, untouched and with a warning that says so.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes a torch.nn.Module, for instance timm.create_model('halonet26t'), not {_what(model)}"
        )
    fast, left = 0, []
    for name, layer in model.named_modules():  # a module that is used twice comes once
        if isinstance(layer, _OURS):
            fast += 1
        elif isinstance(layer, _TIMM):
            obstacle = _obstacle(layer)
            if obstacle is None:
                _FASTER[type(layer)][0].adopt(layer)
                fast += 1
            else:
                left.append(f"{name or 'the model itself'} ({obstacle})")
    if left:
        warnings.warn(f"accelerate leaves as they are: {', '.join(left)}", stacklevel=2)
    elif not fast:
        warnings.warn(_nothing(model), stacklevel=2)
    return model


def _obstacle(layer: nn.Module) -> str | None:
    """Why our forward may not do what this layer does, or None."""
    if type(layer) not in _FASTER:
        return f"{type(layer).__name__} is a subclass of timm's layer"
    if "forward" in vars(layer):
        return "its forward was replaced"
    _, name, kind = _FASTER[type(layer)]
    child = getattr(layer, name)
    if child is None:
        return None
    # By function, not by class: parametrizations change the class and leave the forward.
    if getattr(type(child), "forward", None) is not kind.forward or "forward" in vars(child):
        return f"its {name} is not timm's"
    if isinstance(child, nn.Conv3d) and not _timms(child):
        return f"its {name} is another convolution than timm's"
    hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
    return f"hooks on its {name} would no longer run" if any(hooks) else None


def _timms(conv: nn.Conv3d) -> bool:
    """Whether it is the correlation with zeros beyond the map that timm makes, of which only the weights are used."""
    rows, columns, values = conv.kernel_size
    around = conv.padding == (rows // 2, columns // 2, 0) and conv.padding_mode == "zeros"
    return around and values == conv.groups == conv.in_channels == 1 and {*conv.stride, *conv.dilation} == {1}


def _what(given: object) -> str:
    if isinstance(given, str):
        return f"the string {given!r}; build the model first"
    if isinstance(given, type):
        return f"the class {given.__name__}; make an instance first"
    return f"a {type(given).__name__}"


def _nothing(model: nn.Module) -> str:
    layers = ", ".join(layer.__name__ for layer in _TIMM)
    return (
        f"accelerate found nothing to do: {type(model).__name__} has none of timm's layers {layers} (graphs made by "
        "torch.jit, torch.fx or torch.export have lost them) and comes back as it was"
    )
