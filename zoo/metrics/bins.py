"""Counts of scores in at most `max_bins` bins: exact while the distinct scores fit, coarser by whole bits after that.

A float32 score becomes an integer key of the same order. Bins are keys that agree in all but their lowest `level` bits,
and `level` is the smallest that fits the cap. Both, and so every number made from them, depend only on which scores
were seen: not on their order, nor on how they were split into batches or processes. A bin knows whether it holds one
value (`mixed` is False: nothing is lost, however many pixels share it) or several.
"""

from typing import NamedTuple

import numpy as np
import torch

DEFAULT_MAX_BINS = 2**22
SMALLEST_MAX_BINS = 2**14
# Slots of the dense counter for each bin kept; it lives only while fresh scores are counted.
SLOTS_PER_BIN = 4
# Below this many fresh scores sorting is cheaper than to clear and scan the dense counter.
DENSE_FROM = 2**21
CHUNK = 2**20
PAGE_BITS = 16


class Bins(NamedTuple):
    """Bins in ascending order. key (n,) int32 or int64: the score of a bin of one value, else its lower edge.
    counts (n,) int64; mixed (n,) bool; level: bits that a bin spans."""

    key: np.ndarray
    counts: np.ndarray
    mixed: np.ndarray
    level: int


def ordered(scores: np.ndarray) -> np.ndarray:
    """float32 scores -> int32 keys in the same order; both zeros get one key. Scores must be finite."""
    return flip((np.asarray(scores, np.float32) + np.float32(0)).view(np.int32))


def score_of(keys: np.ndarray) -> np.ndarray:
    """int32 keys -> float32 scores: the inverse of `ordered`."""
    return flip(np.asarray(keys, np.int32)).view(np.float32)


def flip(bits: np.ndarray) -> np.ndarray:
    # The bits of negative floats grow with their magnitude: all but the sign are turned round.
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def absorb(bins: Bins, fresh: np.ndarray, max_bins: int) -> Bins:
    """`bins`, which may be the unsorted union of several, together with the fresh keys (m,) of the same dtype."""
    if fresh.size >= DENSE_FROM and fresh.dtype == np.int32:
        pages = touched_pages(bins.key, fresh)
        level = max(bins.level, page_level(int(pages.sum()), max_bins)) if bins.level else 0
        # At level 0 the dense counter must hold every float of a page, or too little is known to leave level 0.
        if level <= PAGE_BITS and int(pages.sum()) << (PAGE_BITS - level) <= SLOTS_PER_BIN * max_bins:
            return fitted(counted(bins, fresh, level, pages), max_bins)
    fresh = np.sort(fresh)
    starts = run_starts(fresh)
    keys = np.concatenate([bins.key, fresh[starts]])
    counts = np.concatenate([bins.counts, np.diff(starts, append=fresh.size)])
    mixed = np.concatenate([bins.mixed, np.zeros(starts.size, bool)])
    return fitted(grouped(keys, counts, mixed, bins.level), max_bins)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin, of sorted values."""
    if not values.size:
        return np.zeros(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def grouped(keys: np.ndarray, counts: np.ndarray, mixed: np.ndarray, level: int) -> Bins:
    """Bins of `level` from entries in any order."""
    if not keys.size:
        return Bins(keys, counts, mixed, level)
    # A stable sort of few ascending runs merges them in linear time.
    order = np.argsort(keys, kind="stable")
    keys, counts, mixed = keys[order], counts[order], mixed[order]
    starts = run_starts(keys >> level)
    first, last = keys[starts], keys[np.append(starts[1:], keys.size) - 1]
    several = np.logical_or.reduceat(mixed, starts) | (first != last)
    return Bins(np.where(several, (first >> level) << level, first), np.add.reduceat(counts, starts), several, level)


def fitted(bins: Bins, max_bins: int) -> Bins:
    """Bins of the smallest level, not below the present one, at which they fit."""
    if bins.key.size <= max_bins and bins.level == 0:
        return bins
    # Keys agree above the highest bit in which they differ, so one pass tells the number of bins of any level.
    unsigned = np.uint32 if bins.key.dtype == np.int32 else np.uint64
    steps = (bins.key[1:] ^ bins.key[:-1]).view(unsigned)
    level = bins.level
    if unsigned is np.uint32:
        level = max(level, page_level(1 + int(np.count_nonzero(steps >> PAGE_BITS)), max_bins))
    # Above 32 bits a key of AU-PRO holds the size of a component, which is never merged.
    while level < 32 and 1 + int(np.count_nonzero(steps >> unsigned(level))) > max_bins:
        level += 1
    return bins if level == bins.level else grouped(bins.key, bins.counts, bins.mixed, level)


def page_level(pages: int, max_bins: int) -> int:
    """The smallest level at which so many pages of 2^16 keys fit into the dense counter."""
    level = 0
    while level < PAGE_BITS and pages << (PAGE_BITS - level) > SLOTS_PER_BIN * max_bins:
        level += 1
    return level


def touched_pages(*keys: np.ndarray) -> np.ndarray:
    """(65536,) bool: which upper halves occur among int32 keys."""
    touched = np.zeros(2**16, bool)
    for part in keys:
        for start in range(0, part.size, CHUNK):
            touched[(part[start : start + CHUNK] >> PAGE_BITS) + 2**15] = True
    return touched


def counted(bins: Bins, fresh: np.ndarray, level: int, pages: np.ndarray) -> Bins:
    """What `grouped` would give, by counting in one dense array: a tenth of the time of sorting."""
    width = PAGE_BITS - level
    base = (np.cumsum(pages) - 1) << width
    slots = int(pages.sum()) << width
    count = torch.zeros(slots, dtype=torch.int64)
    value = torch.empty(slots, dtype=torch.int32)
    mixed = torch.zeros(slots, dtype=torch.bool)

    def parts(keys: np.ndarray):
        for start in range(0, keys.size, CHUNK):
            part = keys[start : start + CHUNK]
            slot = base[(part >> PAGE_BITS) + 2**15] + ((part & 0xFFFF) >> level)
            yield start, torch.from_numpy(part), torch.from_numpy(slot)

    ones = torch.ones(CHUNK, dtype=torch.int64)
    for start, part, slot in parts(bins.key):
        count.scatter_add_(0, slot, torch.from_numpy(bins.counts[start : start + CHUNK]))
        mixed[slot[torch.from_numpy(bins.mixed[start : start + CHUNK])]] = True
        value[slot] = part
    for _, part, slot in parts(fresh):
        count.scatter_add_(0, slot, ones[: len(part)])
        value[slot] = part
    # Whichever key was written last: where all are equal none differs from it, and otherwise at least one does.
    for keys in (bins.key, fresh):
        for _, part, slot in parts(keys):
            mixed[slot[value[slot] != part]] = True
    used = np.flatnonzero(count.numpy())
    several = mixed.numpy()[used]
    edge = ((np.flatnonzero(pages)[used >> width] - 2**15) << PAGE_BITS) | ((used & ((1 << width) - 1)) << level)
    keys = np.where(several, edge.astype(np.int32), value.numpy()[used])
    return Bins(keys, count.numpy()[used], several, level)
