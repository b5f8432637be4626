"""ConvNorm answers, and counts, as torch's convolution and norm do, whichever way the convolution takes."""

import copy

import pytest
import torch
from torch import nn

from zoo.kernels import dispatch
from zoo.layers import conv2d
from zoo.layers.conv_norm import ConvNorm

NEAR = {"atol": 1e-4, "rtol": 1e-5}  # float32: sums over a batch in another order, divided by a deviation
CHANNELS = pytest.mark.parametrize(("before", "after"), [(3, 28), (28, 12), (28, 16), (8, 16)])


def pair(before, after, bias=False, **factory):
    """ConvNorm, and torch's two layers with the same parameters and counts."""
    ours = ConvNorm(before, after, 3, 2, bias=bias)
    ours.bn.momentum, ours.bn.eps = 0.37, 1e-2
    with torch.no_grad():
        for values in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean, ours.bn.running_var):
            values.copy_(torch.rand(after) + 0.5)
    theirs = nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=bias), nn.BatchNorm2d(after, 1e-2, 0.37))
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


@CHANNELS
@pytest.mark.parametrize("bias", [False, True])
def test_answers_as_torch_does(before, after, bias, monkeypatch):
    """In training and evaluation, with what decides as in half precision in torch.compile."""
    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype)
    monkeypatch.setattr(conv2d, "_HALF", (torch.float32,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours, theirs = pair(before, after, bias)
    x = torch.randn(2, before, 8, 9)
    near(trained(ours, x), trained(theirs, x), **NEAR)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), **NEAR)
    torch.testing.assert_close(ours.fuse()(x), theirs(x), **NEAR)


def test_scripts_traces_and_exports():
    ours, theirs = pair(3, 28)
    x = torch.randn(2, 3, 8, 9)
    want = theirs(x)
    for make in (torch.jit.script, torch.fx.symbolic_trace, lambda net: torch.export.export(net, (x,)).module()):
        torch.testing.assert_close(make(copy.deepcopy(ours))(x), want, **NEAR)


@CHANNELS
def test_compiles_as_one_graph(before, after, monkeypatch):
    """With what decides as if it were on a GPU, in bfloat16, which two ways round at different places."""
    monkeypatch.setattr(conv2d, "elsewhere", lambda x: False)
    ours, theirs = pair(before, after, dtype=torch.bfloat16)
    x = torch.randn(2, before, 8, 9).bfloat16()
    torch._dynamo.reset()
    got = trained(ours, x, torch.compile(ours, fullgraph=True, backend="aot_eager"))
    near(got, trained(theirs, x), atol=2e-2, rtol=2**-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: channels are filled up on a GPU alone")
@CHANNELS
def test_on_a_gpu_in_half_precision(before, after):
    """Compiled, under autocast: as near to float64 as torch's own layers are, uncompiled."""
    torch.manual_seed(0)
    ours, theirs = pair(before, after, device="cuda")
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(4, before, 18, 20, device="cuda").contiguous(memory_format=torch.channels_last)
    want = trained(exact, x.double())
    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16), dispatch.standing_for("auto"):
        got, peer = trained(ours, x, torch.compile(ours, fullgraph=True)), trained(theirs, x)
    for one, other, true in zip(got, peer, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # Both round the same operands to bfloat16 and sum in orders of their own: twice the peer's error, and half of
        # bfloat16's last place, by which the peer may be luckier.
        error, allowed = ((value.double() - true).abs().max().item() for value in (one, other))
        assert error <= 2 * allowed + 2**-9 * true.abs().max().item()
