"""ConvNorm answers, and counts, as torch's convolution and norm do, whichever way it takes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from zoo.kernels import dispatch
from zoo.layers import conv2d, conv_norm
from zoo.layers.conv_norm import ConvNorm

NEAR = {"atol": 1e-4, "rtol": 1e-5}  # float32: sums over a batch in another order, divided by a deviation


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The decisions of half precision in torch.compile; how often channels were filled up for the norm is counted."""
    filled, own = [], conv_norm._filled_norm
    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype)
    monkeypatch.setattr(conv2d, "_HALF", (torch.float32,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(conv_norm, "_filled_norm", lambda *given: filled.append(given[1].shape[1]) or own(*given))
    return filled


def pair(before, after, kernel=3, stride=2, **factory):
    ours = ConvNorm(before, after, kernel, stride)
    with torch.no_grad():
        for values in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean, ours.bn.running_var):
            values.copy_(torch.rand(after) + 0.5)
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    theirs = nn.Sequential(convolution, nn.BatchNorm2d(after))
    theirs.load_state_dict({name.replace("conv", "0").replace("bn", "1"): v for name, v in ours.state_dict().items()})
    return ours.to(**factory), theirs.to(**factory)


def trained(net, x, call=None):
    """Two steps: answers, gradients of x and all parameters, and what the norm counted."""
    results, call = [], net if call is None else call
    for factor in (1, 2):
        leaf = (x * factor).requires_grad_()
        out = call(leaf)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        results += [out, *torch.autograd.grad((out.float() * weights).sum(), [leaf, *net.parameters()])]
    return [*results, *(buffer.clone() for buffer in net.buffers())]


def near(got, want, atol, rtol):
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, atol=atol * max(1, other.abs().max().item()), rtol=rtol)


@pytest.mark.parametrize(
    ("before", "after", "widths"), [(3, 28, [32, 32]), (28, 12, [16, 16]), (28, 16, []), (8, 16, [])]
)
def test_training_is_torchs(before, after, widths, as_on_a_gpu):
    ours, theirs = pair(before, after)
    x = torch.randn(2, before, 8, 9)
    near(trained(ours, x), trained(theirs, x), **NEAR)
    assert as_on_a_gpu == widths
    ours.eval(), theirs.eval()
    as_on_a_gpu.clear()
    torch.testing.assert_close(ours(x), theirs(x), **NEAR)
    assert not as_on_a_gpu  # a norm by constants is no sum over maps


CHANGES = {
    "momentum": lambda net: setattr(net.bn, "momentum", None),
    "affine": lambda net: setattr(net, "bn", nn.BatchNorm2d(28, affine=False)),
    "no running statistics": lambda net: setattr(net, "bn", nn.BatchNorm2d(28, track_running_stats=False)),
    "another norm": lambda net: setattr(net, "bn", nn.GroupNorm(4, 28)),
    "another convolution": lambda net: setattr(net, "conv", nn.Conv2d(3, 28, 3, stride=2, padding=1)),
    "parametrized": lambda net: nn.utils.parametrize.register_parametrization(net.conv, "weight", nn.Tanh()),
    "pruned": lambda net: prune.l1_unstructured(net.conv, "weight", 0.5),
    "a hook on the norm": lambda net: net.bn.register_forward_hook(lambda module, given, out: 2 * out),
    "a hook on gradients": lambda net: net.conv.register_full_backward_hook(lambda module, given, out: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_layers_and_listeners_find_what_they_expect(change, as_on_a_gpu):
    ours, theirs = pair(3, 28)[0], pair(3, 28)[0]
    CHANGES[change](ours)
    CHANGES[change](theirs)
    theirs.load_state_dict(ours.state_dict())
    theirs.forward = lambda x: theirs.bn(theirs.conv(x))
    x = torch.randn(2, 3, 8, 9)
    near(trained(ours, x), trained(theirs, x), **NEAR)
    assert not as_on_a_gpu


def test_scripts_traces_exports_and_compiles():
    ours, theirs = pair(3, 28)
    x = torch.randn(2, 3, 8, 9)
    want = theirs(x)
    for make in (torch.jit.script, torch.fx.symbolic_trace, lambda net: torch.export.export(net, (x,)).module()):
        torch.testing.assert_close(make(copy.deepcopy(ours))(x), want, **NEAR)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), want, **NEAR)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: channels are filled up on a GPU alone")
@pytest.mark.parametrize(("before", "after"), [(3, 28), (28, 12), (28, 16)])
def test_on_a_gpu_in_half_precision(before, after):
    """Compiled, under autocast: as near to float64 as torch's own layers are, uncompiled."""
    torch._dynamo.reset()
    ours, theirs = pair(before, after, device="cuda")
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(4, before, 18, 20, device="cuda").contiguous(memory_format=torch.channels_last)
    want = [value.double() for value in trained(exact, x.double())]
    with torch.autocast("cuda", torch.bfloat16), dispatch.standing_for("auto"):
        got, peer = trained(ours, x, torch.compile(ours, fullgraph=True)), trained(theirs, x)
    for one, other, true in zip(got, peer, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # Twice the peer's error: both round the same operands to bfloat16, and sum in orders of their own.
        error, allowed = ((value.double() - true).abs().max().item() for value in (one, other))
        assert error <= 2 * allowed + 1e-6 * true.abs().max().item()
