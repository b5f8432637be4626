"""Binned counts: what they hold depends on the scores alone, and they lose only what the cap forces them to."""

from collections import Counter

import numpy as np
import pytest

from zoo.metrics import bins as module
from zoo.metrics.bins import SMALLEST_MAX_BINS, Bins, absorb, is_round, ordered, score_of

CAP = SMALLEST_MAX_BINS


def empty(dtype=np.int32):
    return Bins(np.zeros(0, dtype), np.zeros(0, np.int64), 0)


def home(key, level):
    """The smallest key that may share the bin: numbers with `level` + 8 zero bits live alone."""
    edge = key >> level << level
    return edge + 1 if edge % 2 ** min(level + 8, 31) == 0 and key != edge else edge


def by_counting(keys, max_bins):
    """The definition, with dictionaries: {smallest possible key: count} and the level."""
    counts = Counter(int(key) for key in keys)
    pages = len({key >> 16 for key in counts}) if max(map(abs, counts)) < 2**31 else 0
    level = 0
    if len(counts) > max_bins:
        while len({home(key, level) for key in counts}) > max_bins or pages * 2.0 ** (16 - level) > 4 * max_bins:
            level += 1
    merged = Counter()
    for key, count in counts.items():
        merged[home(key, level)] += count
    return merged, level


def as_dict(bins):
    assert (np.diff(bins.key) > 0).all()
    return dict(zip(bins.key.tolist(), bins.counts.tolist(), strict=True)), bins.level


def test_keys_keep_the_order_and_come_back():
    edge = np.float32([0, 1e-45, 1e-38, 1, np.nextafter(np.float32(1), np.float32(2)), 3.4e38])
    values = np.concatenate([-edge[::-1], edge])
    keys = ordered(values)
    assert (np.diff(keys.astype(np.int64)) >= 0).all()
    assert (np.diff(keys) == 0).sum() == 1  # the two zeros
    np.testing.assert_array_equal(score_of(keys), values)


def test_values_that_maps_are_clipped_to_are_round():
    """Of either sign; a level of 8 is the coarsest that the default cap ever needs."""
    assert is_round(ordered(np.float32([0, 0.25, 0.5, 1, -1, -3, 10, 255, -0.125])), 8).all()
    assert not is_round(ordered(np.float32([0.3, -0.3, 1 + 2**-15])), 8).any()


@pytest.mark.parametrize("dense_from", [1, 10**9], ids=["dense", "sorted"])
def test_both_ways_to_count_follow_the_definition(oracles, distribution, dense_from, monkeypatch):
    """40,000 scores in pieces into 16,384 bins; the dense counter must do whatever sorting does."""
    monkeypatch.setattr(module, "DENSE_FROM", dense_from)
    keys = ordered(oracles.scores(distribution, np.random.default_rng(1), 40_000))
    bins = empty()
    for piece in np.split(keys, [10, 5000, 5000, 30_000]):
        bins = absorb(bins, piece, CAP)
    assert as_dict(bins) == by_counting(keys, CAP)


@pytest.mark.parametrize("threads", [1, 2])
def test_dense_counting_takes_part(threads, oracles, monkeypatch):
    """Else the test before would compare sorting with itself: at level 0 and above, and round numbers apart."""
    monkeypatch.setattr(module, "DENSE_FROM", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    seen = []
    count = module.counted
    monkeypatch.setattr(module, "counted", lambda *args: seen.append(count(*args)) or seen[-1])
    for name in ("half ties", "constant"):
        keys = ordered(oracles.scores(name, np.random.default_rng(1), 80_000))
        keys[::1000] += 1  # neighbours of the values that many share
        bins = empty()
        for piece in np.split(keys, 4):
            bins = absorb(bins, piece, CAP)
        assert as_dict(bins) == by_counting(keys, CAP)
        assert bool(seen[-1].level) == (name == "half ties")
    assert any(bins.level > 0 and 0x3E800000 in bins.key and 0x3E800001 in bins.key for bins in seen), "0.25 is apart"


def test_the_cap_forces_levels(oracles):
    """Else the test before would never leave level 0."""
    levels = {
        name: by_counting(ordered(oracles.scores(name, np.random.default_rng(1), 40_000)), CAP)[1]
        for name in oracles.DISTRIBUTIONS
    }
    assert sum(level > 0 for level in levels.values()) >= 8
    assert levels["ties"] == levels["constant"] == levels["concentrated"] == 0


def test_sizes_of_components_stay_apart():
    """64-bit keys: the upper half is never merged, however small the cap."""
    rng = np.random.default_rng(0)
    keys = (rng.integers(1, 9, 60_000) << 32) + rng.integers(0, 2**32, 60_000)
    bins = absorb(absorb(empty(np.int64), keys[:777], CAP), keys[777:], CAP)
    assert as_dict(bins) == by_counting(keys, CAP)
    assert bins.level > 0
    sizes, counts = np.unique(keys >> 32, return_counts=True)
    np.testing.assert_array_equal(np.bincount(bins.key >> 32, weights=bins.counts)[sizes], counts)


def test_union_of_two_is_one(oracles):
    """Unsorted entries of two levels, as an exchange between processes leaves them, and the same from any side."""
    keys = ordered(oracles.scores("normal", np.random.default_rng(2), 50_000))
    small, large = absorb(empty(), keys[:3000], CAP), absorb(empty(), keys[3000:], CAP)
    assert small.level == 0 < large.level
    for a, b in ((small, large), (large, small)):
        parts = [np.concatenate(pair) for pair in zip(a[:2], b[:2], strict=True)]
        union = absorb(Bins(*parts, max(a.level, b.level)), keys[:0], CAP)
        assert as_dict(union) == by_counting(keys, CAP)
