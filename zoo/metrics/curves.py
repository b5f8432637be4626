"""Areas under curves from binned counts, in float64, each with how far the unbinned value can be from it.

A bin of one value is exact: all its pixels are tied, and the definition of the curve says what ties mean. In a mixed
bin, which may hold several, the order of its pixels is unknown, so the curve is known at both ends of the bin only. It
rises between them, hence lies in the rectangle they span, and the straight line through it errs by at most half of it.
"""

from typing import NamedTuple

import numpy as np

from zoo.metrics.bins import Bins, cell, is_round, run_starts


class Steps(NamedTuple):
    """Thresholds in DESCENDING order: key (n,) int32, good (n,) int64 pixels at it, mixed (n,) bool where a
    bin may hold several values, and for each entry
    of the bad bins (m,) int64 the step it belongs to."""

    key: np.ndarray
    good: np.ndarray
    mixed: np.ndarray
    bad_step: np.ndarray

    def weigh(self, weights: np.ndarray) -> np.ndarray:
        """Sums (n,) float64 of the weights (m,) of the bad entries of each step."""
        return np.bincount(self.bad_step, weights=weights, minlength=self.key.size)


def align(good: Bins, bad: Bins) -> Steps:
    """Good and bad bins, both with int32 keys, bad ones in any order, on one axis of thresholds."""
    level = max(good.level, bad.level)
    good_axis, bad_axis = cell(good.key, level), cell(bad.key, level)
    # Mostly sorted runs, which a stable sort merges.
    keys = np.sort(np.concatenate([good_axis, bad_axis]), kind="stable")
    keys = keys[run_starts(keys)]
    # int64 sums held in float64 are exact below 2^53 pixels.
    counts = np.bincount(np.searchsorted(keys, good_axis), weights=good.counts, minlength=keys.size)
    last = keys.size - 1
    mixed = (~is_round(keys, level) if level else np.zeros(keys.size, bool))[::-1]
    return Steps(keys[::-1], counts[::-1].astype(np.int64), mixed, last - np.searchsorted(keys, bad_axis))


def area_below(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Mean height of the curve through the points (x ascending) from 0 to `limit`, interpolated at the limit."""
    inside = int(np.searchsorted(x, limit, side="right"))
    area = np.trapezoid(y[:inside], x[:inside])
    if 0 < inside < x.size and x[inside - 1] < limit:
        part = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        end = y[inside - 1] + part * (y[inside] - y[inside - 1])
        area += (limit - x[inside - 1]) * (end + y[inside - 1]) / 2
    return float(area / limit)


def every_threshold(steps: Steps, overlap: np.ndarray, limits: tuple[float, ...]) -> list[tuple[float, float]]:
    """Area and its largest error, for each limit, of the curve with a point at every distinct score and at (0, 0).

    Args:
        overlap: (n,) by how much the mean overlap grows at each step.
    """
    total = steps.good.sum()
    fpr = np.concatenate([[0.0], np.cumsum(steps.good) / total])
    pro = np.concatenate([[0.0], np.cumsum(overlap)])
    box = np.where(steps.mixed, steps.good / total * overlap / 2, 0.0)
    # A step counts as soon as it starts left of the limit.
    reach = [int(np.searchsorted(fpr[:-1], limit)) for limit in limits]
    return [(area_below(fpr, pro, limit), float(box[:n].sum()) / limit) for limit, n in zip(limits, reach, strict=True)]


def at_positions(
    steps: Steps, overlap: np.ndarray, limits: tuple[float, ...], positions: int
) -> list[tuple[float, float]]:
    """Area and its largest error, for each limit, of the curve at equidistant POSITIONS in the sorted good scores.

    Position p of N has FPR 1 - (p + 1) / N, whatever is tied with it, and the overlap strictly above its score; the
    point (1, 1) is added.
    """
    total = int(steps.good.sum())
    position = np.linspace(0, total - 1, positions).astype(np.int64)[::-1]
    seen = np.cumsum(steps.good)
    from_top = total - 1 - position
    at = np.searchsorted(seen, from_top, side="right")
    above = np.concatenate([[0.0], np.cumsum(overlap)])[at]
    # In a mixed bin the scores are taken as evenly spread: the k-th largest of n good ones has k / (n + 1) above it.
    rank = from_top - (seen[at] - steps.good[at]) + 1
    unclear = np.where(steps.mixed[at], overlap[at], 0.0)
    fpr = np.append(1 - (position + 1) / total, 1.0)
    pro = np.append(above + unclear * rank / (steps.good[at] + 1), 1.0)
    doubt = np.append(unclear, 0.0)
    return [(area_below(fpr, pro, limit), area_below(fpr, doubt, limit)) for limit in limits]


def auroc(steps: Steps, bad: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve and its largest error; bad (n,): defective ones at each step. NaN without both kinds."""
    goods, bads = steps.good.sum(), bad.sum()
    if not goods or not bads:
        return np.nan, 0.0
    good = steps.good / goods
    below = 1 - np.cumsum(good)
    value = float(np.sum(bad / bads * (below + good / 2)))
    return value, float(np.sum(np.where(steps.mixed, good * (bad / bads) / 2, 0.0)))


def average_precision(steps: Steps, bad: np.ndarray) -> tuple[float, float]:
    """Sum over thresholds of (gain of recall) x precision, and its largest error. NaN without defects."""
    bads = bad.sum()
    if not bads:
        return np.nan, 0.0
    hits, alarms = np.cumsum(bad), np.cumsum(steps.good)
    gain = bad / bads
    precision = hits / (hits + alarms)
    # A mixed bin at its best has all its defects before its good pixels; at its worst behind them, one by one.
    best = hits / np.maximum(hits + alarms - steps.good, 1)
    first = hits - bad + 1
    worst = np.where(bad > 0, first / (first + alarms), precision)
    doubt = np.maximum(best - precision, precision - worst)
    return float(np.sum(gain * precision)), float(np.sum(np.where(steps.mixed, gain * doubt, 0.0)))


def largest_f1(steps: Steps, bad: np.ndarray) -> tuple[float, float, int]:
    """Largest F1, its largest error, and the key of the lowest score that counts as defective.

    Of several equal ones the highest. NaN without defects (the key is then 0).
    """
    bads = bad.sum()
    if not bads:
        return np.nan, 0.0, 0
    hits, alarms = np.cumsum(bad), np.cumsum(steps.good)
    f1 = 2 * hits / (hits + alarms + bads)
    best = int(np.argmax(f1))
    within = 2 * hits / (hits + alarms - steps.good + bads)
    doubt = max(0.0, float(np.max(np.where(steps.mixed, within, 0.0)) - f1[best]))
    return float(f1[best]), doubt, int(steps.key[best])
