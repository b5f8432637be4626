"""AU-PRO against loops over all thresholds and components."""

import math

import numpy as np
import pytest
import torch

from zoo.errors import UsageError
from zoo.metrics import AUPRO

LIMITS = (1.0, 0.3, 0.05, 0.01)
# float64 inside; the answer is rounded to float32.
ROUNDED = 1e-7


def answers(maps, masks, limits=LIMITS, **options):
    metric = AUPRO(limits, **options)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks))
    return {name: value.item() for name, value in metric.compute().items()}


def close(ours, name, oracle, limits=LIMITS):
    np.testing.assert_allclose([ours[f"{name}_{limit:g}"] for limit in limits], oracle, rtol=0, atol=ROUNDED)


def test_every_threshold_is_the_loop(oracles, distribution):
    maps, masks = oracles.photos(distribution, seed=3, count=6, side=20)
    close(answers(maps, masks), "aupro", oracles.every_threshold(maps, masks, LIMITS))


@pytest.mark.parametrize("count", [99, 7])
def test_positions_are_the_loop(oracles, distribution, count):
    maps, masks = oracles.photos(distribution, seed=4, count=6, side=20)
    close(answers(maps, masks, thresholds=count), "aupro", oracles.at_positions(maps, masks, LIMITS, count))


@pytest.mark.parametrize("thresholds", ["all", 99])
@pytest.mark.parametrize("name", ["normal", "ties"])
def test_sizes_are_the_loop(oracles, name, thresholds):
    maps, masks = oracles.photos(name, seed=5, count=9, side=20)
    sizes = sorted(len(blob) for blob in oracles.flood(masks))
    assert len(set(sizes)) > 5
    quartiles, weighted = (
        answers(maps, masks, thresholds=thresholds, sizes=kind) for kind in ("quartiles", "weighted")
    )
    assert len(quartiles) == 4 * len(LIMITS)
    for variant, ours in [*((f"q{k}", quartiles) for k in (1, 2, 3, 4)), ("weighted", weighted)]:
        if thresholds == "all":
            expected = oracles.every_threshold(maps, masks, LIMITS, variant)
        else:
            expected = oracles.at_positions(maps, masks, LIMITS, thresholds, variant)
        close(ours, f"aupro_{variant}", expected)


def test_perfect_maps_of_the_weighted_variant():
    """Mean of smallest / size, as the definition says: components of 1, 4 and 2 pixels."""
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 0, 0] = mask[0, 3:5, 3:5] = mask[0, 7, 6:8] = True
    ours = answers(mask.astype(np.float32), mask, (0.3,), sizes="weighted")
    assert ours["aupro_weighted_0.3"] == pytest.approx((1 + 1 / 4 + 1 / 2) / 3, abs=ROUNDED)


def test_diagonal_neighbours_are_one_component():
    """Two touching pixels found at different thresholds: as one component each is worth a half of it."""
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 3, 3] = True
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 0, 0] = 2
    maps[0, 0, 3] = 1  # one good pixel of 13 above the rest
    # Overlap is 1/4 from FPR 0 to 1/13: a half of one of two components.
    assert answers(maps, mask, (1 / 13,))[f"aupro_{1 / 13:g}"] == pytest.approx(1 / 4, abs=ROUNDED)


def test_components_do_not_join_across_images():
    """The last row of one image and the first of the next are not neighbours."""
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 3], masks[1, 0, :2] = True, True
    maps = np.zeros((2, 4, 4), np.float32)
    maps[1, 0, :2] = 1
    half = answers(maps, masks, (0.1,), thresholds=1000)["aupro_0.1"]
    assert half == pytest.approx(0.5, abs=ROUNDED)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_constant_maps_are_chance(value):
    """One threshold: every threshold joins (0, 0) and (1, 1); no position has anything strictly above it."""
    masks = np.zeros((2, 16, 16), bool)
    masks[1, 2:5, 2:5] = True
    maps = np.full(masks.shape, value, np.float32)
    close(answers(maps, masks), "aupro", [limit / 2 for limit in LIMITS])
    assert answers(maps, masks, (0.3, 0.01), thresholds=99) == {"aupro_0.3": 0, "aupro_0.01": 0}


@pytest.mark.parametrize("thresholds", ["all", 99])
@pytest.mark.parametrize("sizes", [None, "quartiles", "weighted"])
@pytest.mark.parametrize("fill", [False, True, None], ids=["no defect", "nothing else", "no image"])
def test_without_both_kinds_of_pixels_it_is_nan(thresholds, sizes, fill):
    metric = AUPRO((0.3,), thresholds=thresholds, sizes=sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric, "_update_count", 1)  # torchmetrics warns of compute before update
        if fill is not None:
            metric.update(torch.rand(2, 1, 8, 8), torch.full((2, 1, 8, 8), fill))
        values = metric.compute()
    assert len(values) == (4 if sizes == "quartiles" else 1)
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limits": ()}, "above 0 and up to 1"),
        ({"limits": (0.3, 0)}, "above 0 and up to 1"),
        ({"limits": (30,)}, "above 0 and up to 1"),
        ({"thresholds": "every"}, '"all", or a number'),
        ({"thresholds": 1}, '"all", or a number'),
        ({"thresholds": 2.5}, '"all", or a number'),
        ({"thresholds": None}, '"all", or a number'),
        ({"sizes": "quartile"}, "Did you mean 'quartiles'"),
        ({"max_bins": 100}, "at least 16384"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        AUPRO(**options)
