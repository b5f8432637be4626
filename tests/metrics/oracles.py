"""Slow answers from the definitions: float64, every score kept, loops; nothing of zoo."""

import numpy as np
from scipy import ndimage


def scores(name, rng, shape):
    """float32 scores of a distribution that is hard to bin."""
    normal = rng.standard_normal(shape)
    made = {
        "plain": lambda: np.abs(normal),
        "normal": lambda: normal,
        "concentrated": lambda: 0.5 + 1e-6 * normal,
        "offset": lambda: 1000 + normal,
        "heavy tails": lambda: rng.standard_cauchy(shape),
        "huge range": lambda: np.exp(15 * normal),
        "signed range": lambda: np.sign(normal) * np.exp(12 * rng.standard_normal(shape)),
        "ties": lambda: np.round(normal, 1),
        "half ties": lambda: np.where(rng.random(shape) < 0.5, 0.25, rng.random(shape)),
        "clipped": lambda: np.clip(normal, -1, 1),
        "rectified": lambda: np.maximum(normal, 0),
        "negative": lambda: -np.exp(normal),
        "two narrow peaks": lambda: np.where(rng.random(shape) < 0.5, 1 + 1e-5 * normal, 1e-3 + 1e-8 * normal),
        "peak and spread": lambda: np.where(rng.random(shape) < 0.9, 1 + 1e-5 * normal, np.exp(15 * normal)),
        "subnormal": lambda: 1e-42 * normal,
        "constant": lambda: np.full(shape, 0.125),
    }
    return made[name]().astype(np.float32)


DISTRIBUTIONS = [
    "plain", "normal", "concentrated", "offset", "heavy tails", "huge range", "signed range", "ties", "half ties",
    "clipped", "rectified", "negative", "two narrow peaks", "peak and spread", "subnormal", "constant",
]  # fmt: skip


def photos(name, seed, count, side):
    """Maps float32 and masks bool (count, side, side): first good images, then discs of many sizes, touching too."""
    rng = np.random.default_rng(seed)
    maps, masks = scores(name, rng, (count, side, side)), np.zeros((count, side, side), bool)
    y, x = np.mgrid[:side, :side]
    for mask in masks[count // 3 :]:
        for _ in range(rng.integers(1, 6)):
            cy, cx = rng.integers(0, side, 2)
            mask |= (y - cy) ** 2 + (x - cx) ** 2 <= rng.integers(0, max(2, side // 6)) ** 2
    # Defects score higher on average, and the order within and across the two kinds stays mixed.
    swap = masks & (rng.random(masks.shape) < 0.5)
    maps[swap] = np.maximum(maps[swap], scores(name, rng, int(swap.sum())))
    return maps, masks


def flood(masks):
    """Flat pixel numbers of each 8-connected component of masks (B, H, W), by flood fill."""
    found = []
    for number, mask in enumerate(masks):
        left = set(zip(*(side.tolist() for side in np.nonzero(mask)), strict=True))
        while left:
            stack, blob = [left.pop()], []
            while stack:
                y, x = stack.pop()
                blob.append(number * mask.size + y * mask.shape[1] + x)
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                stack += near
            found.append(np.array(blob))
    return found


def labelled(masks):
    """The same through scipy, for masks too large for loops."""
    found = []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, 2))
        at, order = labels.ravel(), np.argsort(labels.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(at, minlength=count + 1))
        found += [number * mask.size + order[ends[k - 1] : ends[k]] for k in range(1, count + 1)]
    return found


def chosen(blobs, variant):
    """[(component, factor)] whose sum of factor x overlap is the ordinate: all, q1 to q4, or weighted."""
    sizes = np.array([len(blob) for blob in blobs])
    if variant == "weighted":
        return [(blob, sizes.min() / len(blob) / len(blobs)) for blob in blobs]
    edge = np.inf if variant in ("all", "q4") else np.quantile(sizes, {"q1": 0.25, "q2": 0.5, "q3": 0.75}[variant])
    kept = [blob for blob in blobs if len(blob) <= edge]
    return [(blob, 1 / len(kept)) for blob in kept]


def cut(x, y, limit):
    """Area of the polyline up to the limit, over the limit."""
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x1 > limit:
            if x0 < limit:
                end = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + end) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def every_threshold(maps, masks, limits, variant="all"):
    """AU-PRO at each limit by a loop over all distinct scores."""
    flat, good = maps.astype(np.float64).ravel(), maps[~masks].astype(np.float64)
    parts = chosen(flood(masks), variant)
    x, y = [0.0], [0.0]
    for threshold in np.unique(flat)[::-1]:
        x.append(np.mean(good >= threshold))
        y.append(sum(factor * np.mean(flat[blob] >= threshold) for blob, factor in parts))
    return [cut(x, y, limit) for limit in limits]


def at_positions(maps, masks, limits, count, variant="all"):
    """AU-PRO at each limit by a loop over the positions."""
    flat, good = maps.astype(np.float64).ravel(), np.sort(maps[~masks].astype(np.float64))
    parts = chosen(flood(masks), variant)
    points = [(1.0, 1.0)]
    for place in np.linspace(0, len(good) - 1, count):
        p = int(place)
        overlap = sum(factor * np.mean(flat[blob] > good[p]) for blob, factor in parts)
        points.append((1 - (p + 1) / len(good), overlap))
    x, y = zip(*points[::-1], strict=True)
    return [cut(x, y, limit) for limit in limits]


def many_pixels(maps, masks, limits):
    """AU-PRO at every threshold without any curve: each defective pixel adds its weight x the FPRs that it is found at.

    A pixel with a share F of the good ones above it and t tied with it is found, on average over the tied order, at
    max(0, limit - F - u t) for u uniform in (0, 1).
    """
    flat, good = maps.astype(np.float64).ravel(), np.sort(maps[~masks].astype(np.float64))
    blobs = labelled(masks)
    pixels = np.concatenate(blobs)
    weight = np.concatenate([np.full(len(blob), 1 / len(blob) / len(blobs)) for blob in blobs])
    order = np.argsort(flat[pixels])
    value, weight = flat[pixels][order], weight[order]
    above = 1 - np.searchsorted(good, value, side="right") / len(good)
    tied = 1 - np.searchsorted(good, value, side="left") / len(good) - above
    answers = []
    for limit in limits:
        rest = limit - above
        partly = np.where(tied > 0, np.clip(rest, 0, None) ** 2 / np.where(tied > 0, 2 * tied, 1), 0)
        answers.append(float(np.sum(weight * np.where(rest >= tied, rest - tied / 2, partly)) / limit))
    return answers


def many_positions(maps, masks, limits, count):
    """`at_positions` for large maps."""
    flat, good = maps.astype(np.float64).ravel(), np.sort(maps[~masks].astype(np.float64))
    place = np.linspace(0, len(good) - 1, count).astype(int)
    blobs = [np.sort(flat[blob]) for blob in labelled(masks)]
    overlap = np.mean([1 - np.searchsorted(blob, good[place], side="right") / len(blob) for blob in blobs], axis=0)
    x, y = [*(1 - (place + 1) / len(good))[::-1], 1.0], [*overlap[::-1], 1.0]
    return [cut(x, y, limit) for limit in limits]


def largest_f1(flat, defective):
    """(F1, lowest score that counts as defective) by a loop over all distinct scores, from the highest."""
    best = (-1.0, None)
    for threshold in np.unique(flat)[::-1]:
        called = flat >= threshold
        f1 = 2 * np.sum(called & defective) / (np.sum(called) + np.sum(defective))
        best = max(best, (f1, threshold), key=lambda pair: pair[0])
    return best
