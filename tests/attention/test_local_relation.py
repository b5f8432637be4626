"""Local relation aggregation against the sums of the paper, written as loops over positions in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

DIM = 4
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def make(**options):
    torch.manual_seed(1)
    return create_attention("local_relation", DIM, layout="map", **options).double().eval()


def image(height, width):
    return torch.randn(1, DIM, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def values(attention, x):
    """v of one image x (DIM, H, W), channel by channel."""
    weight, bias = attention.v.weight[:, :, 0, 0], attention.v.bias
    out = torch.zeros(attention.dim_out, *x.shape[1:], dtype=torch.float64)
    for c in range(attention.dim_out):
        for d in range(DIM):
            out[c] += weight[c, d] * x[d]
        if bias is not None:
            out[c] += bias[c]
    return out


def gathered(attention, v, seen=None):
    """Equation 4: what each place takes from its neighbours, before the projection."""
    _, height, width = v.shape
    reach = attention.affinity.weight.shape[-1] // 2
    out = torch.zeros_like(v)
    for row in range(height):
        for column in range(width):
            for c in range(v.shape[0]):
                total = attention.affinity.bias[c].item()
                for y in range(max(0, row - reach), min(height, row + reach + 1)):
                    for x in range(max(0, column - reach), min(width, column + reach + 1)):
                        if seen is None or seen[y * width + x]:
                            a = attention.affinity.weight[c, 0, y - row + reach, x - column + reach].item()
                            total += a * v[c, y, x].item()
                out[c, row, column] = total
    return out


def project(attention, gathered):
    if isinstance(attention.proj, torch.nn.Identity):
        return gathered
    return torch.einsum("ed,dhw->ehw", attention.proj.weight[:, :, 0, 0], gathered) + attention.proj.bias[:, None, None]


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 3}, {"kernel_size": 1}, {"qkv_bias": False}, {"proj": False}, {"dim_out": 6}],
    ids=str,
)
@torch.no_grad()
def test_equations(options):
    attention, x = make(**options), image(3, 7)
    want = project(attention, gathered(attention, values(attention, x[0])))
    torch.testing.assert_close(attention(x)[0], want, **EXACT)


@torch.no_grad()
def test_masked_neighbours_are_not_there():
    attention, x = make(), image(3, 4)
    seen = [True, False, True, True, False, True, True, True, False, True, True, True]
    want = project(attention, gathered(attention, values(attention, x[0]), seen))
    torch.testing.assert_close(attention(x, key_mask=torch.tensor([seen]))[0], want, **EXACT)
    got = attention(x, key_mask=torch.zeros(1, 12, dtype=torch.bool))
    torch.testing.assert_close(got[0], attention.proj.bias[:, None, None].expand(-1, 3, 4), **EXACT)


@pytest.mark.parametrize("seen", [None, [True, False, True, True, False, True] * 2])
@pytest.mark.parametrize("grid", [(3, 4), (1, 12)])
@torch.no_grad()
def test_map_and_the_bias_of_the_affinities_rebuild_the_answer(grid, seen):
    attention, x = make(), image(*grid)
    mask = None if seen is None else torch.tensor([seen])
    weights = attention.attention_map(x, key_mask=mask).double()[0]
    v = values(attention, x[0]).flatten(1)
    taken = torch.stack([weights[c] @ v[c] for c in range(DIM)]) + attention.affinity.bias[:, None]
    want = project(attention, taken.unflatten(1, grid))
    # The map is float32 by contract.
    torch.testing.assert_close(attention(x, key_mask=mask)[0], want, rtol=1e-5, atol=1e-5)


def test_wrong_options_help():
    with pytest.raises(UsageError, match=r"kernel_size=4.*odd"):
        create_attention("local_relation", DIM, kernel_size=4)


def test_declared_cost_is_what_is_computed():
    attention = create_attention("local_relation", 32, layout="map")
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 32, 2, 5))
    assert counter.get_total_flops() / 2 == eval(attention_spec("local_relation").cost, {"N": 10, "C": 32})
