"""Fixed patterns over rows and columns against loops over pairs, and what they become at their limits."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

from .pair_loops import DIM, EXACT, answer, as_softmax, attend, cells, image, make, projected

GRID = (3, 4)


def pattern_of(place, prefix, rule):
    """Whether query n sees key m: `rule` of two cells, and everything where a prefix token is one of them."""

    def seen(n, m):
        return n < prefix or m < prefix or rule(place[n - prefix], place[m - prefix])

    return seen


def row(a, b):
    return a[0] == b[0]


def column(a, b):
    return a[1] == b[1]


def either(a, b):
    return row(a, b) or column(a, b)


STRIDED = {"heads": [row, row, column, column], "union": [either] * 4, "rows": [row] * 4, "columns": [column] * 4}


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("pattern", STRIDED)
def test_strided_is_rows_and_columns(pattern, prefix):
    attention = make("sparse_strided", pattern=pattern, num_prefix_tokens=prefix)
    x = image(prefix + 12)
    q, k, v = projected(attention, x[0])
    heads = [attend(q[a], k[a], v[a], pattern_of(cells(GRID), prefix, rule)) for a, rule in enumerate(STRIDED[pattern])]
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, heads), **EXACT)


def edge(a, b):
    return row(a, b) or b[1] >= GRID[1] - 2


def spaced(a, b):
    # The middles of 2 equal parts of 3 rows and of 4 columns.
    return row(a, b) or b[0] in (0, 2) or b[1] in (1, 3)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("summary", "rule"), [("edge", edge), ("spaced", spaced)])
def test_fixed_is_the_row_and_the_summary(summary, rule, prefix):
    attention = make("sparse_fixed", summary=summary, summary_size=2, num_prefix_tokens=prefix)
    x = image(prefix + 12)
    q, k, v = projected(attention, x[0])
    heads = [attend(q[a], k[a], v[a], pattern_of(cells(GRID), prefix, rule)) for a in range(4)]
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, heads), **EXACT)


def test_a_grid_of_one_row():
    """Row heads see everything, column heads only their own token; under one softmax that is everything."""
    x = image(7)
    for pattern in ("rows", "union"):
        attention = make("sparse_strided", pattern=pattern)
        torch.testing.assert_close(attention(x, (1, 7)), as_softmax(attention)(x), **EXACT)
    attention = make("sparse_strided", pattern="columns")
    own = answer(attention, projected(attention, x[0])[2])
    torch.testing.assert_close(attention(x, (1, 7))[0], own, **EXACT)


@pytest.mark.parametrize("summary", ["edge", "spaced"])
@pytest.mark.parametrize("size", [4, 9])
def test_a_summary_of_all_columns_is_full_attention(summary, size):
    attention = make("sparse_fixed", summary=summary, summary_size=size)
    x = image(12)
    torch.testing.assert_close(attention(x, GRID), as_softmax(attention)(x), **EXACT)


def test_the_strided_set_of_the_paper_is_the_column():
    """In the paper's raster of stride l = W, {j: (i - j) mod l = 0} without causality."""
    weights = make("sparse_strided", pattern="columns").attention_map(image(12), GRID)[0]
    for i in range(12):
        for j in range(12):
            assert bool((weights[:, i, j] > 0).all()) == ((i - j) % GRID[1] == 0)


def test_the_stride_follows_the_grid_and_a_single_head_sees_both():
    attention = create_attention("sparse_strided", DIM, num_heads=1).double().eval()
    for grid in ((3, 4), (4, 3)):
        weights, place = attention.attention_map(image(12), grid)[0, 0], cells(grid)
        found = [[bool(weights[i, j] > 0) for j in range(12)] for i in range(12)]
        assert found == [[either(a, b) for b in place] for a in place]
    odd = create_attention("sparse_strided", 15, num_heads=3).double().eval()
    weights = odd.attention_map(image(12, dim=15), GRID)[0]
    assert [int((weights[a, 0] > 0).sum()) for a in range(3)] == [4, 4, 3]


def test_a_query_whose_row_is_masked_answers_zero():
    attention = make("sparse_strided", pattern="rows")
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, 4:8] = False
    out = attention(image(12), GRID, key_mask=mask)[0]
    torch.testing.assert_close(out[4:8], attention.proj.bias.expand(4, -1), **EXACT)
    assert attention.attention_map(image(12), GRID, key_mask=mask)[0, :, 4:8].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("sparse_strided", {"pattern": "row"}, "Did you mean 'rows'"),
        ("sparse_fixed", {"summary": "edges"}, "Did you mean 'edge'"),
        ("sparse_fixed", {"summary_size": 0}, "summary_size=0.*at least 1"),
    ],
)
def test_wrong_options_are_named(name, options, named):
    with pytest.raises(UsageError, match=named):
        create_attention(name, 32, **options)


@pytest.mark.parametrize("name", ["sparse_strided", "sparse_fixed", "multi_scale_window"])
def test_declared_cost_is_what_is_computed(name):
    attention = create_attention(name, 32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, 12, 32, requires_grad=True), GRID)
    assert counter.get_total_flops() / 2 == eval(attention_spec(name).cost, {"N": 12, "C": 32})
