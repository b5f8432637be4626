"""Counts of scores in at most `max_bins` bins: exact while the distinct scores fit, coarser by whole bits after that.

A float32 score becomes an integer key of the same order. Bins are keys that agree in all but their lowest `level` bits,
and `level` is the smallest that fits the cap. Both, and so every number made from them, depend only on which scores
were seen: not on their order, nor on how they were split into batches or processes. Round numbers, whose lowest
`level` + 8 bits are zero, have bins of their own, because many pixels share them where maps are clipped or rectified.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")

DEFAULT_MAX_BINS = 2**21
SMALLEST_MAX_BINS = 2**14
# Scores that wait for each bin, so that the bins are gone through seldom.
WAITING_PER_BIN = 24
# Slots of the dense counter for each bin kept; it lives only while fresh scores are counted.
SLOTS_PER_BIN = 4
# Below this many fresh scores sorting is cheaper than to clear and scan the dense counter.
DENSE_FROM = 2**21
PAGE_BITS = 16
# Bits beyond the level that are zero in a round number.
ROUND_BITS = 8
# Fresh keys counted in one go: their number fits an int32.
AT_ONCE = 2**26
# Threads that count have slots of their own each: memory pays for every one.
MOST_THREADS = 2
# Keys at a time whose slots stay in the cache.
CACHED = 2**15


class Bins(NamedTuple):
    """Bins in ascending order. key (n,) int32 or int64: the smallest score that may be in the bin, see `cell`;
    counts (n,) int64; level: bits that a bin spans."""

    key: np.ndarray
    counts: np.ndarray
    level: int


def ordered(scores: np.ndarray) -> np.ndarray:
    """float32 scores -> int32 keys in the same order; both zeros get one key. Scores must be finite."""
    bits = np.asarray(scores, np.float32).view(np.int32)
    sign = bits >> 31
    # The bits of a magnitude grow with it. Negated, and not inverted, so that round numbers stay round.
    keys = bits & np.int32(0x7FFFFFFF)
    keys ^= sign
    keys -= sign
    return keys


def score_of(keys: np.ndarray) -> np.ndarray:
    """int32 keys -> float32 scores: the inverse of `ordered`."""
    sign = np.asarray(keys, np.int32) >> 31
    return (((keys ^ sign) - sign) | (sign & np.int32(-(2**31)))).view(np.float32)


def absorb(bins: Bins, fresh: np.ndarray, max_bins: int) -> Bins:
    """`bins`, which may be the unsorted union of several, together with the fresh keys (m,) of the same dtype."""
    start = 0
    while start == 0 or start < fresh.size:
        # Only sorting finds the first level, which takes no more than this.
        end = start + (AT_ONCE if bins.level else 2 * max_bins)
        piece, start = fresh[start:end], end
        added = dense(piece, bins, max_bins) if piece.size >= DENSE_FROM and piece.dtype == np.int32 else None
        if added is None:
            piece = np.sort(piece)
            starts = run_starts(piece)
            added = Bins(piece[starts], np.diff(starts, append=piece.size), bins.level)
        key, counts = (np.concatenate(pair) for pair in zip(bins[:2], added[:2], strict=True))
        bins = fitted(grouped(key, counts, added.level), max_bins)
    return bins


def cell(keys: np.ndarray, level: int) -> np.ndarray:
    """Which bin each key belongs to: the smallest key that may be in it."""
    if not level:
        return keys
    edge = (keys >> level) << level
    return edge + ((keys != edge) & is_round(edge, level))


def is_round(keys: np.ndarray, level: int) -> np.ndarray:
    """Which keys have a bin of their own at the level. Of the keys that `cell` gives, no other bin's is round."""
    return (keys & keys.dtype.type((1 << min(level + ROUND_BITS, 31)) - 1)) == 0


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin, of sorted values."""
    if not values.size:
        return np.zeros(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def grouped(keys: np.ndarray, counts: np.ndarray, level: int) -> Bins:
    """Bins of `level` from entries in any order."""
    if not keys.size:
        return Bins(keys, counts, level)
    if not (keys[1:] >= keys[:-1]).all():
        # A stable sort of few ascending runs merges them in linear time.
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
    cells = cell(keys, level)
    starts = run_starts(cells)
    return Bins(cells[starts], np.add.reduceat(counts, starts), level)


def fitted(bins: Bins, max_bins: int) -> Bins:
    """Bins of the smallest level, not below the present one, at which they fit."""
    if bins.key.size <= max_bins and bins.level == 0:
        return bins
    level, number = bins.level, bins.key.size
    if bins.key.dtype == np.int32:
        level = max(level, page_level(run_starts(bins.key >> PAGE_BITS).size, max_bins))
    # Above 32 bits a key of AU-PRO holds the size of a component, which is never merged.
    while level < 32 and (number if level == bins.level else run_starts(cell(bins.key, level)).size) > max_bins:
        level += 1
    return bins if level == bins.level else grouped(bins.key, bins.counts, level)


def page_level(pages: int, max_bins: int) -> int:
    """The smallest level at which so many pages of 2^16 keys fit into the dense counter."""
    level = 0
    while level < PAGE_BITS and pages << (PAGE_BITS - level) > SLOTS_PER_BIN * max_bins:
        level += 1
    return level


def dense(fresh: np.ndarray, bins: Bins, max_bins: int) -> Bins | None:
    """The fresh keys counted at a level that the union with `bins` needs anyhow; None if sorting must find it out."""
    pages = touched_pages(bins.key, fresh)
    number = int(pages.sum())
    # At level 0 every float of the pages needs a slot: too little is known to leave it.
    level = max(bins.level, page_level(number, max_bins)) if bins.level else 0
    if number << (PAGE_BITS - min(level, PAGE_BITS)) > SLOTS_PER_BIN * max_bins or level > PAGE_BITS:
        return None
    return counted(fresh, level, pages)


def touched_pages(*keys: np.ndarray) -> np.ndarray:
    """(65536,) bool: which upper halves occur among int32 keys."""
    touched, ones = torch.zeros(2**16, dtype=torch.uint8), torch.ones(CACHED, dtype=torch.uint8)

    def touch(part: np.ndarray) -> None:
        for start in range(0, part.size, CACHED):
            page = (torch.from_numpy(part[start : start + CACHED]) >> PAGE_BITS).add_(2**15).long()
            touched.scatter_(0, page, ones[: len(page)])

    for part in keys:
        _in_threads(touch, part)
    return touched.numpy() > 0


def counted(fresh: np.ndarray, level: int, pages: np.ndarray) -> Bins:
    """Bins of `level`, not in order, from int32 keys, by counting in one dense array: much faster than sorting.

    Round numbers are counted once more by themselves.
    """
    width = PAGE_BITS - level
    base = torch.from_numpy((np.cumsum(pages) - 1) << width)
    slots = int(pages.sum()) << width

    def count(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # numpy asks the system for huge pages, without which looking up addresses takes half of the time.
        counts, rounds = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        ones = torch.ones(CACHED, dtype=torch.int32)
        for start in range(0, part.size, CACHED):
            keys = torch.from_numpy(part[start : start + CACHED])
            slot = base.index_select(0, (keys >> PAGE_BITS) + 2**15).add_((keys & 0xFFFF) >> level)
            torch.from_numpy(counts).scatter_add_(0, slot, ones[: len(slot)])
            np.add.at(rounds, slot.numpy()[is_round(keys.numpy(), level)], 1)
        return counts, rounds

    (counts, rounds), *others = _in_threads(count, fresh)
    for more, more_rounds in others:
        counts += more
        rounds += more_rounds
    used = np.flatnonzero(counts)
    edge = ((np.flatnonzero(pages)[used >> width] - 2**15) << PAGE_BITS) | ((used & ((1 << width) - 1)) << level)
    edge, alone = edge.astype(np.int32), rounds[used]
    rest = counts[used] - alone
    own, other = alone > 0, rest > 0
    key = np.concatenate([edge[own], cell(edge[other] + np.int32(level > 0), level)])
    return Bins(key, np.concatenate([alone[own], rest[other]]).astype(np.int64), level)


def _in_threads(work: Callable[[np.ndarray], T], values: np.ndarray) -> list[T]:
    """What `work` gives for each thread's part of `values`; numpy and torch let threads work side by side."""
    parts = np.array_split(values, min(torch.get_num_threads(), MOST_THREADS))
    if len(parts) == 1:
        return [work(values)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, parts))
