"""AUROC, average precision and the largest F1 against scikit-learn and a loop."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from zoo.metrics import ImageAUPR, ImageAUROC, ImageF1Max, PixelAUPR, PixelAUROC, PixelF1Max

# float64 inside; the answer is rounded to float32.
ROUNDED = 1e-7


def value(kind, scores, flags, **options):
    metric = kind(**options)
    metric.update(torch.from_numpy(scores), torch.from_numpy(flags))
    return metric.compute()


def below(score):
    """The neighbouring float32, which a score must exceed to be one from `score` on."""
    return np.nextafter(score, np.float32(-np.inf))


def test_pixels(oracles, distribution):
    maps, masks = oracles.photos(distribution, seed=6, count=6, side=20)
    flat, flags = maps.ravel().astype(np.float64), masks.ravel()
    assert value(PixelAUROC, maps, masks).item() == pytest.approx(roc_auc_score(flags, flat), abs=ROUNDED)
    assert value(PixelAUPR, maps, masks).item() == pytest.approx(average_precision_score(flags, flat), abs=ROUNDED)
    f1, lowest = oracles.largest_f1(flat, flags)
    ours = value(PixelF1Max, maps, masks)
    assert ours["f1"].item() == pytest.approx(f1, abs=ROUNDED)
    # Defective is what lies above, as a task flags it.
    assert np.array_equal(flat > ours["threshold"].item(), flat >= lowest)


def test_images(oracles, distribution):
    rng = np.random.default_rng(7)
    scores, flags = oracles.scores(distribution, rng, 300), rng.random(300) < 0.4
    scores = np.where(flags & (rng.random(300) < 0.5), np.maximum(scores, np.median(scores)), scores)
    assert value(ImageAUROC, scores, flags).item() == pytest.approx(roc_auc_score(flags, scores), abs=ROUNDED)
    assert value(ImageAUPR, scores, flags).item() == pytest.approx(average_precision_score(flags, scores), abs=ROUNDED)
    f1, lowest = oracles.largest_f1(scores.astype(np.float64), flags)
    ours = value(ImageF1Max, scores, flags)
    assert ours["f1"].item() == pytest.approx(f1, abs=ROUNDED)
    assert np.array_equal(scores > ours["threshold"].item(), scores >= lowest)


def test_constant_scores_are_chance():
    """All tied: half, the share of defects p, and 2p / (1 + p) when all are called defective."""
    scores, flags = np.full(10, 0.3, np.float32), np.arange(10) < 4
    assert value(ImageAUROC, scores, flags).item() == 0.5
    assert value(ImageAUPR, scores, flags).item() == pytest.approx(0.4, abs=ROUNDED)
    ours = value(ImageF1Max, scores, flags)
    assert ours["f1"].item() == pytest.approx(0.8 / 1.4, abs=ROUNDED)
    assert ours["threshold"].item() == below(np.float32(0.3))


@pytest.mark.parametrize("present", [False, True])
def test_with_one_kind_only(present):
    """No defects: nothing to find, NaN. No good ones: every threshold is precise, but no false alarm has a rate."""
    scores, flags = np.float32([0.1, 0.7, 0.4]), np.full(3, present)
    assert math.isnan(value(ImageAUROC, scores, flags))
    ours = value(ImageF1Max, scores, flags)
    if present:
        assert value(ImageAUPR, scores, flags).item() == 1
        assert ours["f1"].item() == 1
        assert ours["threshold"].item() == below(np.float32(0.1))
    else:
        assert math.isnan(value(ImageAUPR, scores, flags))
        assert math.isnan(ours["f1"])
        assert math.isnan(ours["threshold"])


def test_of_equal_f1_the_highest_threshold():
    """3 of 4 called with 2 hits, and 1 called with 1 hit, tie at F1 = 2/3 (two defects)."""
    ours = value(ImageF1Max, np.float32([4, 3, 2, 1]), np.array([True, False, False, True]))
    assert ours["f1"].item() == pytest.approx(2 / 3, abs=ROUNDED)
    assert ours["threshold"].item() == below(np.float32(4))
