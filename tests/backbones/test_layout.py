"""Channels-last from stem to head: one training step of a network, traced, changes no map's layout.

A depthwise convolution of an ordinary map costs four times one of a channels-last map, and a batch norm has to copy it.
"""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo  # noqa: F401

aten = torch.ops.aten
BATCH = 2  # and no other tensor's first size
COPIES = {aten.clone.default, aten._to_copy.default, aten.copy_.default, aten.contiguous.default}
READERS = {
    aten.convolution.default: (0,),
    aten.convolution_backward.default: (0, 1),
    aten.native_batch_norm.default: (0,),
    aten.native_batch_norm_backward.default: (0, 1),
    aten.avg_pool2d.default: (0,),
}


def layout(x):
    """Says "last", "first" or "both" (a size of 1 hides the order) of a map; None for other tensors.

    A part of a map's channels counts as the map does: what decides is which of its numbers lie side by side.
    """
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[0] != BATCH:
        return None
    if 1 in (x.shape[1], x.shape[2] * x.shape[3]):
        return "both"
    return "last" if x.stride(1) == 1 else "first"


class Turns(TorchDispatchMode):
    """Notes every copy of a map from one layout to the other, and every layer that reads an ordinary map."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in COPIES:
            before, after = layout(args[1] if function is aten.copy_.default else args[0]), layout(out)
            if {before, after} == {"last", "first"}:
                self.found.append(f"{function}: {before} -> {after} {tuple(out.shape)}")
        for place in READERS.get(function, ()):
            self.seen += 1
            if layout(args[place]) == "first":
                self.found.append(f"{function} reads {layout(args[place])} {tuple(args[place].shape)}")
        return out


def turns(network, size):
    network = network.to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Turns() as mode:
        network(images).square().sum().backward()
    assert mode.seen > 10
    return mode.found


NAMES = {
    "zoo_uniformer_small": {},
    "zoo_shvit_s1": {},
    "zoo_flatten_swin_tiny": {"img_size": 96},
    "zoo_flatten_pvt_tiny": {"img_size": 96},
    "zoo_halonet_h0": {},
    "zoo_lambda_resnet50": {"img_size": 96},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_turns_no_map(name):
    network = timm.create_model(name, num_classes=3, **NAMES[name])
    assert turns(network, 96) == []


def test_a_map_that_is_turned_is_found():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))

        def forward(self, x):
            for conv in self.convs:
                x = conv(x.contiguous())
            return x

    assert any("last -> first" in found for found in turns(Turned(), 8))
