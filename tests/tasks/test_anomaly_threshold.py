"""The threshold against a search over every possible one, and what it does in the corners."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from zoo.errors import UsageError
from zoo.tasks.threshold import KeptScores, choose_threshold


def f1_at(scores, labels, threshold):
    return f1_score(labels, np.asarray(scores) > threshold, zero_division=0)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_threshold_has_a_larger_f1(seed):
    generator = np.random.default_rng(seed)
    labels = generator.random(60) < 0.3
    # Rounded on purpose: ties between good and defective images are where a search by rank goes wrong.
    scores = np.round(generator.normal(labels * 1.0, 1.0), 1).astype(np.float32)
    threshold = choose_threshold(torch.tensor(scores), torch.tensor(labels), 0.0)
    values = np.unique(scores)
    everything = [values[0] - 1, *((values[1:] + values[:-1]) / 2), values[-1] + 1]
    best = max(f1_at(scores, labels, t) for t in everything)
    assert f1_at(scores, labels, threshold) == pytest.approx(best, abs=1e-12)


def test_it_lies_in_the_middle_of_the_widest_gap_that_does():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.9, 1.0])
    assert choose_threshold(scores, scores > 0.5, 0.0) == pytest.approx(0.6, abs=1e-6)


def test_it_separates_neighbouring_floats():
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2), dtype=np.float32)
    threshold = choose_threshold(torch.tensor([low, high]), torch.tensor([False, True]), 0.0)
    assert not np.float32(low) > np.float32(threshold)
    assert np.float32(high) > np.float32(threshold)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::17])
def test_the_order_of_the_images_does_not_matter(order):
    scores, labels = torch.tensor([1.0, 3.0, 2.0, 2.5, 0.5]), torch.tensor([0, 1, 1, 0, 0]).bool()
    order = list(order)
    assert choose_threshold(scores[order], labels[order], 0.0) == choose_threshold(scores, labels, 0.0)


def test_all_defective_calls_all_so():
    scores = torch.tensor([2.0, 3.0, 0.0])
    assert bool((scores > choose_threshold(scores, torch.ones(3).bool(), 0.0)).all())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25])
def test_without_defects_it_is_a_quantile_of_the_good(share):
    scores = np.random.default_rng(0).gamma(2.0, size=200).astype(np.float32)
    threshold = choose_threshold(torch.tensor(scores), torch.zeros(200).bool(), share)
    assert threshold == pytest.approx(np.quantile(scores.astype(np.float64), 1 - share), rel=1e-6)
    assert math.floor(share * 200) >= (scores > threshold).sum() >= math.floor(share * 200) - 2


def test_nothing_to_choose_from():
    with pytest.raises(UsageError, match="no validation images"):
        choose_threshold(torch.zeros(0), torch.zeros(0).bool(), 0.0)
    with pytest.raises(UsageError, match="not finite"):
        choose_threshold(torch.tensor([1.0, float("nan")]), torch.zeros(2).bool(), 0.0)


def test_scores_of_all_batches_are_kept():
    metric = KeptScores()
    assert [len(part) for part in metric.compute()] == [0, 0]
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    metric.update(torch.tensor([3.0]), torch.tensor([1]))
    scores, defective = metric.compute()
    assert scores.tolist() == [1.0, 2.0, 3.0]
    assert defective.tolist() == [False, True, True]
