"""What a test report counts: one row an image, one row a defect, and the tables that follow from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUARTILES = ("Q1", "Q2", "Q3", "Q4")


@dataclass(frozen=True)
class ImageRow:
    """One tested image. Shares are of pixels, None where the image has no mask."""

    path: str
    kind: str
    defective: bool
    score: float
    defect_share: float | None
    covered: float | None
    spilled: float | None


@dataclass(frozen=True)
class DefectRow:
    """One connected region (8 neighbours) of a mask. `covered`: share of its pixels above the threshold of pixels."""

    path: str
    kind: str
    pixels: int
    covered: float


@dataclass(frozen=True)
class KindLine:
    """One line of the table by kind. Image columns, then defect columns; nan where there is nothing to count."""

    kind: str
    images: int
    above: int
    auroc: float
    defects: int
    hit: int
    covered: float


@dataclass(frozen=True)
class SizeLine:
    """Defects of one kind (or "all") and one quartile of size; from `low` to `high` pixels."""

    kind: str
    quartile: str
    low: int
    high: int
    defects: int
    hit: int
    covered: float


def measure(
    path: str, kind: str, defective: bool, score: float, above: np.ndarray, mask: np.ndarray | None
) -> tuple[ImageRow, list[DefectRow]]:
    """The rows of one image.

    Args:
        above: bool (H, W), the pixels above the threshold of pixels.
        mask: bool (H, W); None where nobody drew one.
    """
    if mask is None:
        return ImageRow(path, kind, defective, score, None, None, None), []
    import cv2

    inside = int(mask.sum())
    both = int((above & mask).sum())
    image = ImageRow(
        path,
        kind,
        defective,
        score,
        inside / mask.size,
        both / inside if inside else None,
        (int(above.sum()) - both) / (mask.size - inside) if inside < mask.size else None,
    )
    if not inside:
        return image, []
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    sizes = np.bincount(labels.ravel(), minlength=count)
    hits = np.bincount(labels.ravel(), weights=above.ravel(), minlength=count)
    return image, [DefectRow(path, kind, int(sizes[i]), float(hits[i] / sizes[i])) for i in range(1, count)]


def auroc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Share of pairs (good, bad) in which the bad score is higher, ties counting half; nan without a pair."""
    if not len(good) or not len(bad):
        return math.nan
    ordered = np.sort(np.asarray(good, np.float64))
    low, high = (np.searchsorted(ordered, np.asarray(bad, np.float64), side=side) for side in ("left", "right"))
    return float((low + high).sum() / (2 * len(good) * len(bad)))


def by_kind(images: Sequence[ImageRow], defects: Sequence[DefectRow], threshold: float) -> list[KindLine]:
    """The table by kind: defects in alphabetical order, all of them together, then the good images.

    The AUROC of a kind is that of its images against all good ones.
    """
    good = [row.score for row in images if not row.defective]
    kinds = sorted({row.kind for row in images if row.defective})
    lines = []
    for kind in [*kinds, "all defects"]:
        mine = [row for row in images if row.defective and kind in (row.kind, "all defects")]
        regions = [row for row in defects if kind in (row.kind, "all defects")]
        if mine and not (kind == "all defects" and len(kinds) == 1):
            scores = [row.score for row in mine]
            above = sum(score > threshold for score in scores)
            lines.append(KindLine(kind, len(mine), above, auroc(good, scores), *_of_regions(regions)))
    if good:
        lines.append(KindLine("good", len(good), sum(score > threshold for score in good), math.nan, 0, 0, math.nan))
    return lines


def by_size(defects: Sequence[DefectRow]) -> list[SizeLine]:
    """The table by size: all defects, then each kind, by the quartiles of the sizes of ALL defects.

    A quartile holds what is larger than the one before, so that every defect is counted once.
    """
    if not defects:
        return []
    edges = np.quantile([row.pixels for row in defects], (0.25, 0.5, 0.75))
    kinds = sorted({row.kind for row in defects})
    lines = []
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        mine = [row for row in defects if kind in (row.kind, "all")]
        for i, quartile in enumerate(QUARTILES):
            part = [row for row in mine if int(np.searchsorted(edges, row.pixels, side="left")) == i]
            if part:
                sizes = [row.pixels for row in part]
                lines.append(SizeLine(kind, quartile, min(sizes), max(sizes), *_of_regions(part)))
    return lines


def _of_regions(rows: Sequence[DefectRow]) -> tuple[int, int, float]:
    covered = float(np.mean([row.covered for row in rows])) if rows else math.nan
    return len(rows), sum(row.covered > 0 for row in rows), covered


def percent(value: float | None, digits: int = 1) -> str:
    """A share in words; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def share(part: int, of: int) -> str:
    """For instance "3 of 4 (75 %)"; a dash of nothing."""
    return f"{part} of {of} ({100 * part / of:.0f} %)" if of else "-"


KIND_COLUMNS = ("kind", "above threshold", "AUROC", "defects hit", "covered")
SIZE_COLUMNS = ("kind", "size", "pixels", "defects hit", "covered")


def kind_cells(line: KindLine) -> tuple[str, ...]:
    """A line of `by_kind` as text, under KIND_COLUMNS."""
    auroc_text = "-" if math.isnan(line.auroc) else f"{line.auroc:.3f}"
    return (
        line.kind,
        share(line.above, line.images),
        auroc_text,
        share(line.hit, line.defects),
        percent(line.covered),
    )


def size_cells(line: SizeLine) -> tuple[str, ...]:
    """A line of `by_size` as text, under SIZE_COLUMNS."""
    pixels = f"{line.low:,}" if line.low == line.high else f"{line.low:,} to {line.high:,}"
    return line.kind, line.quartile, pixels, share(line.hit, line.defects), percent(line.covered)
