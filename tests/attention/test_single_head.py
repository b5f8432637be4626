"""Single-head attention against the paper's equations, written as loops over positions in float64."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

DIM, PART, WIDTH = 8, 3, 4
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@torch.no_grad()
def make(**options):
    generator = torch.Generator().manual_seed(1)
    options = {"partial_dim": PART, "qk_dim": WIDTH, **options}
    attention = create_attention("single_head", DIM, layout="map", **options).double().eval()
    for value in [*attention.parameters(), *(b for b in attention.buffers() if b.ndim)]:
        value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return attention


def image(height, width):
    return torch.randn(1, DIM, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def conv_norm(layer, columns):
    """1x1 convolution and BatchNorm in evaluation, for columns (channels, N)."""
    bn = layer.bn
    out = layer.conv.weight[:, :, 0, 0] @ columns
    scale = bn.weight / (bn.running_var + 1e-5).sqrt()
    return (out - bn.running_mean[:, None]) * scale[:, None] + bn.bias[:, None]


def normalised(attention, part, seen):
    """Equation of GroupNorm with one group over the places that are seen, value by value."""
    chosen = [value.item() for row in part for value, there in zip(row, seen, strict=True) if there]
    mean = sum(chosen) / len(chosen)
    variance = sum((value - mean) ** 2 for value in chosen) / len(chosen)
    out = (part - mean) / math.sqrt(variance + 1e-5)
    return out * attention.norm.weight[:, None] + attention.norm.bias[:, None]


def expected(attention, x, seen=None, bias=None):
    """Answer of one image x (DIM, H, W) and the weights of its queries."""
    columns = x.flatten(1)
    count, part = columns.shape[1], attention.partial_dim
    seen = [True] * count if seen is None else seen
    qkv = conv_norm(attention.qkv, normalised(attention, columns[:part], seen))
    width = attention.qk_dim
    q, k, v = qkv[:width], qkv[width : 2 * width], qkv[2 * width :]
    weights, out = torch.zeros(count, count, dtype=torch.float64), torch.zeros(part, count, dtype=torch.float64)
    for n in range(count):
        logits = {}
        for m in range(count):
            if seen[m]:
                added = 0.0 if bias is None else bias[n, m].item()
                logits[m] = sum(q[c, n].item() * k[c, m].item() for c in range(width)) / math.sqrt(width) + added
        total = sum(math.exp(value) for value in logits.values())
        for m, value in logits.items():
            weights[n, m] = math.exp(value) / total
            out[:, n] += weights[n, m] * v[:, m]
    joined = torch.cat([out, columns[part:]]).clamp(min=0)
    return conv_norm(attention.proj, joined).unflatten(1, x.shape[1:]), weights


@pytest.mark.parametrize("options", [{}, {"qk_dim": 5}, {"partial_dim": 1}, {"partial_dim": DIM}], ids=str)
@torch.no_grad()
def test_equations(options):
    attention, x = make(**options), image(3, 4)
    torch.testing.assert_close(attention(x)[0], expected(attention, x[0])[0], **EXACT)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attention(last), attention(x), **EXACT)


@torch.no_grad()
def test_masked_keys_count_neither_in_the_norm_nor_as_keys():
    attention, x = make(), image(3, 4)
    seen = [True, False, True, True, False, True, True, True, False, True, True, True]
    mask = torch.tensor([seen])
    # The mean and variance of the places that are not seen are no one's business: compare where they are.
    want, weights = expected(attention, x[0], seen)
    got = attention(x, key_mask=mask)[0].flatten(1)
    places = [n for n in range(12) if seen[n]]
    torch.testing.assert_close(got[:, places], want.flatten(1)[:, places], **EXACT)
    drawn = attention.attention_map(x, key_mask=mask)[0, 0]
    torch.testing.assert_close(drawn[places], weights[places], **EXACT)


@torch.no_grad()
def test_bias_is_added_to_the_logits():
    attention, x = make(), image(3, 4)
    bias = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want, _ = expected(attention, x[0], bias=bias)
    # A bias is rounded to float32.
    torch.testing.assert_close(attention(x, bias=bias[None, None])[0], want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_weights_times_values_rebuild_the_answer():
    attention, x = make(), image(3, 4)
    columns = x[0].flatten(1)
    v = conv_norm(attention.qkv, normalised(attention, columns[:PART], [True] * 12))[2 * WIDTH :]
    joined = torch.cat([v @ attention.attention_map(x)[0, 0].T, columns[PART:]]).clamp(min=0)
    torch.testing.assert_close(attention(x)[0].flatten(1), conv_norm(attention.proj, joined), **EXACT)


def test_channels_that_do_not_attend_go_round_the_norm():
    attention, x = make(), image(2, 2).requires_grad_()
    with torch.no_grad():
        attention.proj.conv.weight[:, :PART] = 0
        x[:, PART:].abs_()
    out = attention(x)
    out.sum().backward()
    assert (x.grad[:, :PART] == 0).all()
    assert (x.grad[:, PART:] != 0).all()


def test_the_part_that_attends_is_the_papers():
    """1 / 4.67 of the channels: 32 of 149.4, 75 of 350."""
    parts = {dim: create_attention("single_head", dim).attn.partial_dim for dim in (1, 4, 149, 350)}
    assert parts == {1: 1, 4: 1, 149: 32, 350: 75}


def test_wrong_options_help():
    with pytest.raises(UsageError, match=r"partial_dim=9.*1 to 8"):
        create_attention("single_head", DIM, partial_dim=9)
    with pytest.raises(UsageError, match="qk_dim=0"):
        create_attention("single_head", DIM, qk_dim=0)


def test_declared_cost_is_what_is_computed():
    attention = create_attention("single_head", 32, layout="map")
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 32, 2, 5))
    assert counter.get_total_flops() / 2 == eval(attention_spec("single_head").cost, {"N": 10, "C": 32, "round": round})


def test_a_bias_over_all_tokens_leaves_out_prefix_tokens_that_pass():
    torch.manual_seed(3)
    alone, beside = (create_attention("single_head", 32, num_prefix_tokens=count).eval() for count in (0, 2))
    beside.attn.load_state_dict(alone.attn.state_dict())
    x, bias = torch.randn(2, 14, 32), 5 * torch.randn(1, 1, 14, 14)
    want = alone(x[:, 2:], (3, 4), bias=bias[:, :, 2:, 2:])
    torch.testing.assert_close(beside(x, (3, 4), bias=bias)[:, 2:], want, rtol=1e-5, atol=1e-5)
    weights = beside.attention_map(x, (3, 4), bias=bias)[:, :, 2:, 2:]
    want = alone.attention_map(x[:, 2:], (3, 4), bias=bias[:, :, 2:, 2:])
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)
    # One number for every key, whatever the query.
    want = alone(x[:, 2:], (3, 4), bias=bias[:, :, :1, 2:])
    torch.testing.assert_close(beside(x, (3, 4), bias=bias[:, :, :1])[:, 2:], want, rtol=1e-5, atol=1e-5)
