"""torch's fused attention: with gradients or a mask never cuDNN's, whose gradients of masked attention can be NaN."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.attention import create_attention, list_attentions
from zoo.layers import sdpa
from zoo.layers.sdpa import dot_product_attention


@pytest.mark.parametrize(
    ("device", "grad", "masked", "cudnn"),
    [
        ("cuda", True, False, False),
        ("cuda", True, True, False),
        ("cuda", False, True, False),
        ("cuda", False, False, True),
        ("cpu", True, True, True),
    ],
)
def test_gradients_and_masks_on_a_gpu_leave_cudnn_out(device, grad, masked, cudnn, monkeypatch):
    seen = []

    def look(q, *args, **kwargs):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        q = torch.empty(1, 1, 64, 8, device=device)
        dot_product_attention(q, q, q, attn_mask=torch.empty(64, 64, device=device) if masked else None)
    assert seen == [(cudnn, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("allowed", "inside"),
    [
        ([SDPBackend.MATH], (False, False, True, False)),
        ([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], (False, False, True, False)),
        # Whoever wants it alone gets it.
        ([SDPBackend.CUDNN_ATTENTION], (False, False, False, True)),
    ],
)
def test_a_backend_that_is_switched_off_stays_off(allowed, inside, monkeypatch):
    seen = []

    def look(q, *args, **kwargs):
        cuda = torch.backends.cuda
        flags = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
        seen.append(tuple(flag() for flag in flags))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    with FakeTensorMode(), sdpa_kernel(allowed):
        q = torch.empty(1, 1, 64, 8, device="cuda")
        dot_product_attention(q, q, q)
    assert seen == [inside]


@pytest.mark.parametrize("call", [dot_product_attention, sdpa._without_cudnn])
def test_equals_torchs_own_as_one_graph(call):
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, mask, 0.0, 0.3)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in list_attentions()),
        ("window", {"rel_pos_bias": True, "window_size": 3}),
        ("shifted_window", {"rel_pos_bias": True, "window_size": 3}),
    ],
)
def test_masks_have_their_keys_side_by_side(name, options, monkeypatch):
    """torch's fused kernels take no others: it falls back to a map in float32."""
    layouts = []
    torchs = F.scaled_dot_product_attention

    def look(q, k, v, attn_mask=None, **kwargs):
        layouts.append(attn_mask is None or attn_mask.stride(-1) == 1)
        return torchs(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    attention = create_attention(name, 32, grid_size=(6, 6), **options)
    attention(torch.randn(2, 36, 32), (6, 6))
    assert all(layouts)
    if options:
        assert layouts  # what this test came from


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: cuDNN's attention is at fault")
def test_masked_attention_of_small_logits_has_gradients():
    """The case of pytorch issue 196678, by way of a mechanism: 64 tokens, a mask, logits of about -120."""
    attention = create_attention("sparse_fixed", 64, num_heads=1, grid_size=(8, 8)).cuda()
    x = 0.1 * torch.randn(4, 64, 64, device="cuda")
    with torch.no_grad():
        attention.qkv.bias[0] = 1.0
        attention.qkv.bias[64] = -120.0 * 64**0.5
        attention.qkv.weight[[0, 64]] = 0.0
    with torch.autocast("cuda", torch.bfloat16):
        attention(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())
