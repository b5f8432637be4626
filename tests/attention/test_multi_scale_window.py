"""Windows of many sizes against loops over pairs, and what they become at their limits."""

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .pair_loops import EXACT, answer, as_softmax, attend, cells, image, make, projected

GRID = (5, 6)


def near(place, side):
    return lambda n, m: max(abs(place[n][0] - place[m][0]), abs(place[n][1] - place[m][1])) <= (side - 1) // 2


def test_every_group_of_heads_has_its_window():
    """Sides of 5 * 2^((g-2)/2): 2.5, 3.5, 5 and 7.1, of which the first two become 3."""
    attention = make("multi_scale_window", window_size=5)
    assert attention.sides == [3, 3, 5, 7]
    x = image(30)
    q, k, v = projected(attention, x[0])
    heads = [attend(q[a], k[a], v[a], near(cells(GRID), side)) for a, side in enumerate([3, 3, 5, 7])]
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, heads), **EXACT)


def test_prefix_tokens_see_all_and_are_seen_by_all():
    attention = make("multi_scale_window", window_size=3, num_prefix_tokens=1)
    x = image(31)
    q, k, v = projected(attention, x[0])
    assert attention.sides == [3, 3, 3, 5]
    heads = [
        attend(q[a], k[a], v[a], lambda n, m, side=side: not n or not m or near(cells(GRID), side)(n - 1, m - 1))
        for a, side in enumerate(attention.sides)
    ]
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, heads), **EXACT)


def test_windows_of_twice_the_grid_are_full_attention():
    attention = make("multi_scale_window", window_size=2 * 2 * 6 + 1)
    assert min(attention.sides) >= 2 * 6 - 1
    torch.testing.assert_close(attention(image(30), GRID), as_softmax(attention)(image(30)), **EXACT)


def test_windows_of_one_cell_project_its_value():
    attention = make("multi_scale_window", window_size=1)
    x = image(30)
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, projected(attention, x[0])[2]), **EXACT)


def test_equal_sides_are_neighbourhood_attention():
    attention = make("multi_scale_window", window_size=5, multi_scale=False)
    assert attention.sides == [5] * 4
    x = image(30)
    q, k, v = projected(attention, x[0])
    heads = [attend(q[a], k[a], v[a], near(cells(GRID), 5)) for a in range(4)]
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, heads), **EXACT)


def test_sides_over_heads_and_layers():
    """The paper's counts w * 2^(g-2) * 2^(l-2) as areas: 49 * 2^(g+l-4), to the nearest odd side."""
    for layer in range(4):
        sides = create_attention("multi_scale_window", 32, num_heads=8, layer_group=layer).sides
        for head, side in enumerate(sides):
            exact = (49 * 2.0 ** (head // 2 + layer - 4)) ** 0.5
            assert side % 2 == 1
            assert side == 3 or abs(side - exact) <= 1
            assert abs(side - exact) <= 1.3  # 3 is the smallest; 1.75 and 2.5 are wanted in the shallowest layers
    assert create_attention("multi_scale_window", 33, num_heads=3).sides == [3, 5, 7]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window_size": 4}, "window_size=4.*odd size"),
        ({"window_size": 0}, "window_size=0.*odd size"),
        ({"layer_group": 4}, "layer_group=4; valid: 0, 1, 2, 3"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        create_attention("multi_scale_window", 32, **options)
