"""Focused linear attention against the paper's equations, written as loops over positions in float64."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

DIM, HEADS = 8, 2
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def make(**options):
    attention = create_attention("focused_linear", DIM, num_heads=HEADS, **options).double().eval()
    generator = torch.Generator().manual_seed(3)
    for key in ("scale", "positional_encoding"):
        value = getattr(attention, key)
        value.data = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return attention


def image(count, seed=4):
    return torch.randn(1, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def focus(row, scale, power):
    """Equation 4 of one token: ReLU, division by softplus(scale), power, the norm over ALL channels restored."""
    t = [(max(v.item(), 0.0) + 1e-6) / math.log1p(math.exp(s.item())) for v, s in zip(row, scale, strict=True)]
    norm = math.sqrt(sum(v * v for v in t))
    raised = [v**power for v in t]
    norm_raised = math.sqrt(sum(v * v for v in raised))
    return [v / norm_raised * norm for v in raised]


def convolve(v, grid, kernel, bias):
    """Depthwise convolution of v (H*W, channels) by hand; kernel (channels, k, k), zeros outside."""
    out, reach = torch.zeros_like(v), kernel.shape[-1] // 2
    for row in range(grid[0]):
        for column in range(grid[1]):
            for channel in range(v.shape[1]):
                total = bias[channel].item()
                for down in range(-reach, reach + 1):
                    for right in range(-reach, reach + 1):
                        y, x = row + down, column + right
                        if 0 <= y < grid[0] and 0 <= x < grid[1]:
                            weight = kernel[channel, down + reach, right + reach].item()
                            total += weight * v[y * grid[1] + x, channel].item()
                out[row * grid[1] + column, channel] = total
    return out


def expected(attention, x, grid, seen=None, positions=None):
    """Answer of one image x (P + H*W, dim), token by token and head by head."""
    prefix, width, out_dim = attention.num_prefix_tokens, attention.head_dim, attention.dim_out
    seen = [True] * len(x) if seen is None else seen
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    positions = attention.positional_encoding[0] if positions is None else positions
    scale, power = attention.scale[0, 0], attention.focusing_factor
    q = [focus(row[:out_dim], scale, power) for row in qkv]
    k = [focus(row[out_dim : 2 * out_dim] + p, scale, power) for row, p in zip(qkv, positions, strict=True)]
    v = qkv[:, 2 * out_dim :]
    keys = [m for m in range(len(x)) if seen[m]]
    out = torch.zeros(len(x), out_dim, dtype=torch.float64)
    for n in range(len(x)):
        for h in range(attention.num_heads):
            part = range(h * width, (h + 1) * width)
            scores = {m: sum(q[n][c] * k[m][c] for c in part) for m in keys}
            mean = sum(scores.values()) / len(keys) + 1e-6
            for c in part:
                out[n, c] = sum(scores[m] / len(keys) * v[m, c].item() for m in keys) / mean
    v = v * torch.tensor(seen)[:, None]
    kernel = attention.dwc.weight[:, 0].repeat(attention.num_heads, 1, 1)
    out[prefix:] += convolve(v[prefix:], grid, kernel, attention.dwc.bias.repeat(attention.num_heads))
    if attention.lepe is not None:
        out[prefix:] += convolve(v[prefix:], grid, attention.lepe.weight[:, 0], attention.lepe.bias)
    return out @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"focusing_factor": 1},
        {"focusing_factor": 4, "kernel_size": 3},
        {"lepe": 3},
        {"dim_out": 4},
        {"num_prefix_tokens": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_equations(options):
    grid = (3, 4)
    attention = make(grid_size=grid, **options)
    x = image(attention.num_prefix_tokens + 12)
    torch.testing.assert_close(attention(x, grid)[0], expected(attention, x[0], grid), **EXACT)


@pytest.mark.parametrize("lepe", [0, 3])
@torch.no_grad()
def test_masked_keys_count_nowhere(lepe):
    """Neither in the sum of keys and values, nor in the mean of keys, nor for the convolutions."""
    grid = (3, 4)
    attention = make(grid_size=grid, lepe=lepe)
    seen = [True, False, True, True, False, True, True, True, False, True, True, True]
    x = image(12)
    want = expected(attention, x[0], grid, seen)
    torch.testing.assert_close(attention(x, grid, key_mask=torch.tensor([seen]))[0], want, **EXACT)


@torch.no_grad()
def test_no_key_at_all_answers_the_bias_of_the_projection():
    attention = make(grid_size=(3, 4))
    got = attention(image(12), (3, 4), key_mask=torch.zeros(1, 12, dtype=torch.bool))
    torch.testing.assert_close(got[0], attention.proj.bias.expand(12, -1), **EXACT)


@torch.no_grad()
def test_positions_are_resized_to_another_grid():
    attention = make(grid_size=(2, 2))
    table = attention.positional_encoding.reshape(1, 2, 2, DIM).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(table, (3, 5), mode="bicubic", antialias=True).flatten(2)[0].T
    x = image(15)
    # Tables are resized in float32 by rule.
    got, want = attention(x, (3, 5))[0], expected(attention, x[0], (3, 5), positions=resized)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_map_and_depthwise_term_rebuild_the_answer(prefix):
    grid = (3, 4)
    attention = make(grid_size=grid, lepe=3, num_prefix_tokens=prefix)
    x = image(prefix + 12)
    v = (x @ attention.qkv.weight.T + attention.qkv.bias)[..., 2 * DIM :]
    heads = v.reshape(1, prefix + 12, HEADS, -1).transpose(1, 2)
    weighted = (attention.attention_map(x, grid).double() @ heads).transpose(1, 2).flatten(2)
    want = (weighted + attention.depthwise(v, grid)) @ attention.proj.weight.T + attention.proj.bias
    # The map is float32 by contract.
    torch.testing.assert_close(attention(x, grid), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_the_map_fall_short_by_the_share_of_epsilon():
    attention = make(grid_size=(3, 4))
    x = image(12)
    sums = attention.attention_map(x, (3, 4)).double().sum(-1)[0]
    qkv = x[0] @ attention.qkv.weight.T + attention.qkv.bias
    positions, scale = attention.positional_encoding[0], attention.scale[0, 0]
    q = [focus(row[:DIM], scale, 3) for row in qkv]
    k = [focus(row[DIM : 2 * DIM] + p, scale, 3) for row, p in zip(qkv, positions, strict=True)]
    for h in range(HEADS):
        part = range(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        for n in range(12):
            mean = sum(q[n][c] * k[m][c] for m in range(12) for c in part) / 12
            # The map is float32 by contract.
            assert sums[h, n].item() == pytest.approx(mean / (mean + 1e-6), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("power", [3, 8])
def test_tokens_that_relu_silences_stay_finite(power):
    """Their 1e-6, raised and squared, is below the smallest float32."""
    attention = create_attention("focused_linear", DIM, num_heads=HEADS, focusing_factor=power, grid_size=(2, 2))
    with torch.no_grad():
        attention.qkv.bias[: 2 * DIM] = -100.0
        attention.scale.fill_(5.0)
    x = image(4).float().requires_grad_()
    out = attention(x, (2, 2))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_wrong_options_help():
    with pytest.raises(UsageError, match=r"kernel_size=4.*odd"):
        create_attention("focused_linear", DIM, kernel_size=4)
    with pytest.raises(UsageError, match=r"lepe=-3.*odd"):
        create_attention("softmax", DIM, lepe=-3)
    with pytest.raises(UsageError, match="focusing_factor=0"):
        create_attention("focused_linear", DIM, focusing_factor=0)
    with pytest.raises(UsageError, match="sr_ratio=2"):
        create_attention("softmax", DIM, lepe=3, sr_ratio=2)


def test_declared_cost_is_what_is_computed():
    attention = create_attention("focused_linear", 32, grid_size=(2, 5))
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 10, 32), (2, 5))
    assert counter.get_total_flops() / 2 == eval(attention_spec("focused_linear").cost, {"N": 10, "C": 32})


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
@torch.no_grad()
def test_local_positions_inside_stripes(grid):
    """CSWin: the convolution of softmax's values sees zeros beyond its own stripe, and beyond the grid."""
    options = {"inner_options": {"num_heads": HEADS, "lepe": 3}, "stripe_width": 2, "grid_size": grid}
    attention = create_attention("cross_window", DIM, **options).double().eval()
    x = image(grid[0] * grid[1])
    with_local, halves = attention(x, grid), []
    for index, branch in enumerate(attention.branches):
        v = (x[0] @ branch.qkv.weight.T + branch.qkv.bias)[:, DIM:].reshape(*grid, DIM // 2)
        local = torch.zeros_like(v)
        side = grid[1 - index]
        for start in range(0, side, 2):
            cells = slice(start, min(start + 2, side))
            part = (slice(None), cells) if index == 0 else (cells, slice(None))
            stripe = v[part]
            answer = convolve(stripe.flatten(0, 1), stripe.shape[:2], branch.lepe.weight[:, 0], branch.lepe.bias)
            local[part] = answer.unflatten(0, stripe.shape[:2])
        halves.append(local.flatten(0, 1))
        branch.lepe = None
    want = attention(x, grid)[0] + torch.cat(halves, dim=1) @ attention.proj.weight.T
    torch.testing.assert_close(with_local[0], want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_that_meet_no_key_stay_finite_under_autocast(dtype):
    """Queries and keys on different channels: their product is 0 but for 1e-6, and so is the normaliser."""
    attention = create_attention("focused_linear", 8, num_heads=1, grid_size=(2, 2)).eval()
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        attention.qkv.bias[[0, 9]] = 2.0
        attention.qkv.bias[16:] = 1.0
        x = torch.randn(1, 4, 8)
        want = attention(x, (2, 2))
        with torch.autocast("cpu", dtype):
            got = attention(x, (2, 2))
    # Values and the projection keep 8 bits in bf16.
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
