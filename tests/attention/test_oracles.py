"""Each mechanism against its paper's equation, written as loops over positions in float64."""

import math

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention

DIM, HEADS = 16, 4
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def linear(module, row):
    out = module.weight @ row
    return out if module.bias is None else out + module.bias


def softmax_loop(attention, queries, keys, seen=None, bias=None):
    """Answers of one image before the projection: lists of token vectors in, one vector a query out."""
    heads, width = attention.num_heads, attention.head_dim
    q = [linear(attention.q if attention.qkv is None else attention.qkv, x)[: heads * width] for x in queries]
    source = attention.kv if attention.qkv is None else attention.qkv
    start = 0 if attention.qkv is None else heads * width
    kv = [linear(source, x)[start:] for x in keys]
    out = []
    for n in range(len(queries)):
        merged = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = []
            for m in range(len(keys)):
                logit = (q[n][part] @ kv[m][part]).item() / math.sqrt(width)
                logits.append(logit + (0.0 if bias is None else bias[h, n, m].item()))
            allowed = [m for m in range(len(keys)) if seen is None or seen[m]]
            total = sum(math.exp(logits[m]) for m in allowed)
            value = torch.zeros(width, dtype=torch.float64)
            for m in allowed:
                value += math.exp(logits[m]) / total * kv[m][heads * width :][part]
            merged.append(value)
        out.append(torch.cat(merged))
    return out


def make(name, **options):
    torch.manual_seed(3)
    return create_attention(name, DIM, **options).double().eval()


def image(count, seed=4):
    return torch.randn(1, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_softmax_with_mask_and_bias():
    attention = make("softmax", num_heads=HEADS)
    x = image(7)
    seen = [True, False, True, True, False, True, True]
    bias = torch.randn(HEADS, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    want = torch.stack([linear(attention.proj, row) for row in softmax_loop(attention, x[0], x[0], seen, bias)])
    got = attention(x, key_mask=torch.tensor([seen]), bias=bias[None])
    torch.testing.assert_close(got[0], want, **EXACT)


def test_softmax_without_any_key_answers_the_bias_of_the_projection():
    attention = make("softmax", num_heads=HEADS)
    x = image(3)
    got = attention(x, key_mask=torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(got[0], attention.proj.bias.expand(3, -1), **EXACT)


def test_softmax_is_timms_attention():
    ours = create_attention("softmax", DIM, num_heads=HEADS, qk_norm=True).eval()
    norm = torch.nn.LayerNorm
    theirs = timm.layers.Attention(DIM, num_heads=HEADS, qkv_bias=True, qk_norm=True, norm_layer=norm).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in (theirs.q_norm, theirs.k_norm):
        module.eps = 1e-6
    x = image(9).float()
    # One float32 kernel on both sides; only the memory layout may differ.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_spatial_reduction_of_keys():
    """3 x 5 tokens reduced twice: the grid is padded with zeros to 4 x 6, so 2 x 3 keys, and one prefix key."""
    attention = make("softmax", num_heads=HEADS, sr_ratio=2, num_prefix_tokens=1)
    x, (height, width) = image(16), (3, 5)
    keys = [x[0, 0]]
    for row in range(2):
        for column in range(3):
            cell = attention.sr.bias.clone()
            for i in range(2):
                for j in range(2):
                    y, z = 2 * row + i, 2 * column + j
                    if y < height and z < width:
                        cell = cell + attention.sr.weight[:, :, i, j] @ x[0, 1 + y * width + z]
            centred = cell - cell.mean()
            normal = centred / torch.sqrt((centred**2).mean() + attention.norm.eps)
            keys.append(normal * attention.norm.weight + attention.norm.bias)
    want = torch.stack([linear(attention.proj, row) for row in softmax_loop(attention, x[0], keys)])
    torch.testing.assert_close(attention(x, (height, width))[0], want, **EXACT)


def test_spatial_reduction_hides_masked_tokens():
    attention = make("softmax", num_heads=HEADS, sr_ratio=2)
    x = image(16)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = False
    weights = attention.attention_map(x, (4, 4), key_mask=mask.flatten(1))
    assert weights[..., 0].abs().max() == 0
    assert weights[..., 1:].min() > 0


def test_uniform_is_the_mean_of_the_values():
    attention = make("uniform")
    x = image(7)
    seen = [True, False, True, True, False, True, True]
    for mask, rows in ((None, range(7)), (torch.tensor([seen]), [m for m in range(7) if seen[m]])):
        mean = sum(linear(attention.v, x[0, m]) for m in rows) / len(rows)
        want = linear(attention.proj, mean)
        torch.testing.assert_close(attention(x, key_mask=mask)[0], want.expand(7, -1), **EXACT)


def groups_of(grid, window, shift):
    """Lists of positions that attend to each other: position p is in window floor((p - shift) / size) on each side."""
    found = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            down = shift[0] if grid[0] > window[0] else 0
            right = shift[1] if grid[1] > window[1] else 0
            key = ((row - down) // window[0], (column - right) // window[1])
            found.setdefault(key, []).append((row, column))
    return list(found.values())


def window_loop(attention, inner, x, grid, groups, table=None, window=None):
    """Output of the inner mechanism, group by group, as (H*W, channels), before any projection of a wrapper."""
    out = torch.zeros(len(x), inner.dim_out, dtype=torch.float64)
    for group in groups:
        index = [row * grid[1] + column for row, column in group]
        bias = None
        if table is not None:
            bias = torch.zeros(inner.num_heads, len(group), len(group), dtype=torch.float64)
            for n, (row, column) in enumerate(group):
                for m, (other_row, other_column) in enumerate(group):
                    down, right = row - other_row + window[0] - 1, column - other_column + window[1] - 1
                    bias[:, n, m] = table[down * (2 * window[1] - 1) + right]
        answers = softmax_loop(inner, [x[i] for i in index], [x[i] for i in index], bias=bias)
        for i, answer in zip(index, answers, strict=True):
            out[i] = linear(inner.proj, answer) if isinstance(inner.proj, torch.nn.Linear) else answer
    return out


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (2, 9), (1, 1)])
@pytest.mark.parametrize("name", ["window", "shifted_window"])
def test_windows_with_relative_positions(name, grid):
    window = (3, 2)
    attention = make(name, window_size=window, rel_pos_bias=True, inner_options={"num_heads": HEADS})
    table = attention.relative_position_bias_table
    table.data = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    shift = attention.shift_size
    assert shift == ((0, 0) if name == "window" else (1, 1))
    x = image(grid[0] * grid[1])
    want = window_loop(attention, attention.inner, x[0], grid, groups_of(grid, window, shift), table, window)
    torch.testing.assert_close(attention(x, grid)[0], want, **EXACT)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_shift_without_bias_cuts_the_same_windows(grid):
    """`uniform` takes no bias, so its grid is padded instead of rolled; the groups are the same."""
    attention = make("shifted_window", inner="uniform", window_size=3)
    x = image(grid[0] * grid[1])
    inner = attention.inner
    want = torch.zeros_like(x[0])
    for group in groups_of(grid, (3, 3), attention.shift_size):
        index = [row * grid[1] + column for row, column in group]
        want[index] = linear(inner.proj, sum(linear(inner.v, x[0, i]) for i in index) / len(index))
    torch.testing.assert_close(attention(x, grid)[0], want, **EXACT)


def test_window_map_rebuilds_the_answer():
    """Weights times values, projected: with padding, a shift and a prefix token."""
    grid = (5, 4)
    attention = make("shifted_window", window_size=3, inner_options={"num_heads": HEADS}, num_prefix_tokens=1)
    x = image(21)
    weights = attention.attention_map(x, grid)
    inner = attention.inner
    values = (x @ inner.qkv.weight.T + inner.qkv.bias)[..., 2 * DIM :].reshape(1, 21, HEADS, -1).transpose(1, 2)
    want = (weights.double() @ values).transpose(1, 2).flatten(2) @ inner.proj.weight.T + inner.proj.bias
    # The map is float32 by contract.
    torch.testing.assert_close(attention(x, grid), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_cross_windows(grid):
    attention = make("cross_window", stripe_width=2, inner_options={"num_heads": HEADS})
    x = image(grid[0] * grid[1])
    halves = []
    for branch, window in zip(attention.branches, ((grid[0], 2), (2, grid[1])), strict=True):
        assert branch.num_heads == HEADS // 2
        halves.append(window_loop(attention, branch, x[0], grid, groups_of(grid, window, (0, 0))))
    want = torch.stack([linear(attention.proj, row) for row in torch.cat(halves, dim=1)])
    torch.testing.assert_close(attention(x, grid)[0], want, **EXACT)


def test_shifted_windows_are_timms_swin_block():
    """timm's own Swin attention, with its cyclic shift and mask, at a size that its windows divide."""
    swin = timm.models.swin_transformer.SwinTransformerBlock(DIM, (6, 6), num_heads=HEADS, window_size=3, shift_size=1)
    swin = swin.eval()
    options = {"inner_options": {"num_heads": HEADS}, "window_size": 3, "shift_size": 1, "rel_pos_bias": True}
    ours = create_attention("shifted_window", DIM, **options).eval()
    theirs = swin.attn.state_dict()
    table = theirs.pop("relative_position_bias_table")
    ours.load_state_dict(
        {f"inner.{k}": v for k, v in theirs.items() if "index" not in k} | {"relative_position_bias_table": table}
    )
    x = image(36).float()
    want = swin._attn(x.reshape(1, 6, 6, DIM)).flatten(1, 2)
    # The masks differ: theirs is -100, ours is far below; exp(-100) is 4e-44.
    torch.testing.assert_close(ours(x, (6, 6)), want, rtol=1e-5, atol=1e-6)


COUNTED = (
    *("softmax", "uniform", "grouped_query", "head_embedding", "optimised", "efficient_params", "super"),
    *("rela", "rela_gated", "normalized", "persistent_memory", "selective", "inverse_distance", "neural"),
    *("multi_token", "hedgehog", "efficient"),
)


@pytest.mark.parametrize("name", COUNTED)
def test_declared_cost_is_what_is_computed(name):
    count, dim = 10, 32
    attention = create_attention(name, dim, grid_size=(2, 5))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, count, dim, requires_grad=True), (2, 5))
    assert counter.get_total_flops() / 2 == eval(attention_spec(name).cost, {"N": count, "C": dim})
