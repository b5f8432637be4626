"""The recorded answers of the authors' evaluation code: every definition, limit, variant and kind of tie."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from zoo.metrics import AUPRO, ImageAUROC, PixelAUROC

FILE = Path(__file__).parents[3] / "shared" / "golden" / "l2bt_metrics.json"
LIMITS = (0.3, 0.1, 0.05, 0.01)
# Answers are returned as float32, whose rounding is 6e-8 of values below 1.
CLOSE = {"rtol": 0, "atol": 1e-7}

pytestmark = pytest.mark.skipif(
    not FILE.is_file(),
    reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here",
)


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def photos(golden):
    """Maps and masks (12, 128, 128) float64, by the rule in the file."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:128, 0:128]
    maps, masks = [], []
    for i in range(12):
        mask = np.zeros((128, 128))
        for _ in range(int(rng.integers(1, 4)) if i >= 4 else 0):
            cy, cx = rng.integers(8, 120, size=2)
            mask[(y - cy) ** 2 + (x - cx) ** 2 <= int(rng.choice([1, 2, 4, 9, 18])) ** 2] = 1
        noise = rng.standard_normal((128, 128))
        u = rng.random()
        smooth = ndimage.uniform_filter(noise, 5, mode="reflect"), ndimage.uniform_filter(mask, 7, mode="reflect")
        maps.append(np.round(2.5 * smooth[0] + 0.9 * smooth[1] + 0.3 * mask * u, 6))
        masks.append(mask)
    check = golden["generation"]["check"]
    np.testing.assert_allclose([m.sum() for m in maps], check["map_sums"], rtol=0, atol=1e-6)
    assert [int(m.sum()) for m in masks] == check["mask_sums"]
    return np.stack(maps), np.stack(masks)


def answers(maps, masks, **options):
    metric = AUPRO(LIMITS, **options)
    metric.update(torch.from_numpy(maps)[:, None], torch.from_numpy(masks)[:, None])
    return {name: value.item() for name, value in metric.compute().items()}


def of(values, name):
    return [values[f"{name}_{limit:g}"] for limit in LIMITS]


def compare_all(maps, masks, recorded):
    np.testing.assert_allclose(of(answers(maps, masks, thresholds=99), "aupro"), recorded["au_pro_all(q4)"], **CLOSE)
    quartiles = answers(maps, masks, thresholds=99, sizes="quartiles")
    for k in (1, 2, 3):
        np.testing.assert_allclose(of(quartiles, f"aupro_q{k}"), recorded[f"au_pro_cumulative_q{k}"], **CLOSE)
    np.testing.assert_allclose(of(quartiles, "aupro_q4"), recorded["au_pro_all(q4)"], **CLOSE)
    weighted = answers(maps, masks, thresholds=99, sizes="weighted")
    np.testing.assert_allclose(of(weighted, "aupro_weighted"), recorded["au_pro_weighted"], **CLOSE)


def test_positions(photos, golden):
    compare_all(*photos, golden["results"])


def test_positions_among_ties(photos, golden):
    """One decimal: strictly above, and the FPR of the position."""
    compare_all(np.round(photos[0], 1), photos[1], golden["tied"]["results"])


def test_other_counts_of_positions(photos, golden):
    for count, recorded in golden["au_pro_other_num_thresholds"].items():
        np.testing.assert_allclose(of(answers(*photos, thresholds=int(count)), "aupro"), recorded, **CLOSE)


def test_perfect_maps(photos, golden):
    np.testing.assert_allclose(of(answers(photos[1], photos[1], thresholds=99), "aupro"), golden["perfect"], **CLOSE)


def test_fewer_pixels_than_positions(golden):
    """Also diagonal neighbours as one component."""
    mask = np.zeros((1, 8, 8))
    mask[0, 0, 0] = mask[0, 1, 1] = 1
    mask[0, 4:7, 4:7] = 1
    maps = ((37 * np.arange(64)) % 64 / 64).reshape(1, 8, 8) + 0.3 * mask
    tiny = golden["tiny"]
    np.testing.assert_allclose(of(answers(maps, mask, thresholds=99), "aupro"), tiny["au_pro"], **CLOSE)
    weighted = of(answers(maps, mask, thresholds=99, sizes="weighted"), "aupro_weighted")
    np.testing.assert_allclose(weighted, tiny["au_pro_weighted"], **CLOSE)


def test_every_threshold(photos, golden):
    """The exact computation, and anomalib's in float32, which was recorded as equal to it to 1e-7."""
    ours = answers(*photos)
    for limit in LIMITS:
        exact = golden["exact_all_thresholds_own_code"][str(limit)]
        assert ours[f"aupro_{limit:g}"] == pytest.approx(exact, rel=0, abs=1e-7)
        assert ours[f"aupro_{limit:g}"] == pytest.approx(golden["anomalib_aupro"]["by_fpr_limit"][str(limit)], rel=2e-6)


def test_rankings(photos, golden):
    pixels = PixelAUROC()
    pixels.update(torch.from_numpy(photos[0]), torch.from_numpy(photos[1]))
    assert pixels.compute().item() == pytest.approx(golden["pixel_auroc"], rel=0, abs=1e-7)
    for kind in ("top0p1pct", "max"):
        images = ImageAUROC()
        images.update(torch.tensor(golden[f"image_scores_{kind}"]), torch.tensor(golden["image_labels"]))
        assert images.compute().item() == pytest.approx(golden[f"image_auroc_{kind}"], rel=0, abs=1e-7)
