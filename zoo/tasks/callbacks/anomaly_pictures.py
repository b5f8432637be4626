"""Pictures of a test: image, mask, heat map and contour of one example, and the scores of all images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.tasks.callbacks.anomaly_gallery import Example
from zoo.tasks.callbacks.anomaly_rows import ImageRow

FOUND, TRUTH = "#ff3b30", "#00d0ff"
_TRUTH_TEXT = "#0086a8"  # the same hue, legible on white
_GOOD, _BAD = "#5b7fa6", "#d9682b"
_CURVED = 96


def verdict(defective: bool, score: float, threshold: float) -> str:
    """What came of an image, in a word or two."""
    if math.isnan(threshold):
        return "defect" if defective else "good"
    if defective:
        return "found" if score > threshold else "missed"
    return "false alarm" if score > threshold else "passed"


def heat_range(examples: Sequence[Example], pixel_threshold: float) -> tuple[float, float]:
    """Lower and upper end of the colours, the same for all pictures of a report.

    From what is usual in a good image (any image where none is good) up to where strong defects lie.
    """
    good = [e for e in examples if not e.defective] or list(examples)
    low = float(np.median([np.median(e.map) for e in good]))
    high = float(np.median([e.map.max() for e in examples if e.defective] or [e.map.max() for e in examples]))
    if math.isfinite(pixel_threshold):
        high = max(high, pixel_threshold + (pixel_threshold - low) / 2)
    return low, high if high > low else low + max(abs(low), 1.0) * 1e-3


def draw_example(
    example: Example, path: Path, threshold: float, pixel_threshold: float, heat: tuple[float, float]
) -> None:
    """Writes image | mask | heat map | contour of one example.

    Args:
        heat: ends of the colours of the heat map, see `heat_range`.
    """
    from matplotlib.figure import Figure

    height, width = example.map.shape
    rows, columns = (4, 1) if width > 2.5 * height else (2, 2) if width > 1.5 * height else (1, 4)
    panel = float(np.clip(2.9 * (width / height) ** 0.5, 1.7, 6.0))
    tall = panel * height / width
    figure = Figure(figsize=(columns * panel + 0.9, rows * (tall + 0.3) + 0.45), layout="constrained", dpi=110)
    # Panels of one size side by side: the colour bar stands outside of them.
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, title in zip(grid, ("image", "mask", "heat map", ""), strict=True):
        axes.set_title(title, fontsize=9, color="#444444", pad=3)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#bbbbbb", linewidth=0.6)
    _show(grid[0], example.image)
    if example.mask is None:
        grid[1].set(xlim=(0, width), ylim=(height, 0), aspect="equal", facecolor="#f2f2f2")
        grid[1].text(0.5, 0.5, "no mask", ha="center", va="center", color="#777777", transform=grid[1].transAxes)
    else:
        grid[1].imshow(example.mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    drawn = grid[2].imshow(example.map, cmap="inferno", vmin=heat[0], vmax=heat[1], interpolation="nearest")
    _colour_bar(figure, drawn, grid, pixel_threshold, heat)
    _show(grid[3], example.image)
    _outline(grid[3], example, pixel_threshold)
    grid[3].set_title("mask", fontsize=9, color=_TRUTH_TEXT, pad=3, loc="left")
    grid[3].set_title("flagged pixels", fontsize=9, color=FOUND, pad=3, loc="right")
    limit = "" if math.isnan(threshold) else f" (image threshold {threshold:.4g})"
    name = short_path(example.path)
    word = verdict(example.defective, example.score, threshold)
    figure.suptitle(f"{example.kind}: {word}, score {example.score:.4g}{limit}\n{name}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def short_path(path: str, limit: int = 60) -> str:
    """A path, or as many of its last folders as fit in `limit` characters; one long name loses its beginning."""
    if len(path) <= limit:
        return path
    parts = Path(path).parts
    ends = ("…/" + "/".join(parts[n:]) for n in range(1, len(parts)))
    return next((end for end in ends if len(end) <= limit), "…" + parts[-1][1 - limit :])


def draw_scores(images: Sequence[ImageRow], threshold: float, path: Path) -> None:
    """Writes how the scores of good and defective images lie about the threshold: a histogram, and every image."""
    from matplotlib.figure import Figure

    kinds = ["good", *sorted({row.kind for row in images if row.defective})]
    scores = {kind: np.array([r.score for r in images if _named(r) == kind]) for kind in kinds}
    strip = 0.28 * len(kinds) + 0.5
    figure = Figure(figsize=(8.6, 2.9 + strip), layout="constrained", dpi=110)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, strip])
    every = np.concatenate(list(scores.values()))
    bins = np.histogram_bin_edges(every, bins=int(np.clip(len(every) / 6, 24, 60)))
    bad = np.concatenate([scores[kind] for kind in kinds[1:]]) if len(kinds) > 1 else np.zeros(0)
    for values, colour, name in ((scores["good"], _GOOD, "good"), (bad, _BAD, "defective")):
        if len(values):
            top.hist(values, bins, color=colour, alpha=0.6, edgecolor=colour, label=f"{name} ({len(values)})")
    top.set(ylabel="images")
    top.yaxis.get_major_locator().set_params(integer=True)
    generator = np.random.default_rng(0)
    for place, kind in enumerate(kinds):
        values = scores[kind]
        height = place + generator.uniform(-0.28, 0.28, len(values))
        below.plot(values, height, ".", color=_BAD if place else _GOOD, alpha=0.5, markersize=6, markeredgewidth=0)
    below.set_yticks(range(len(kinds)), [k if len(k) <= 18 else k[:17] + "…" for k in kinds], fontsize=8)
    below.set(xlabel="score of the image", ylim=(len(kinds) - 0.4, -0.6))
    if math.isfinite(threshold):
        for axes in (top, below):
            axes.axvline(threshold, color="black", linewidth=1.1, linestyle=(0, (4, 3)))
        top.plot([], [], color="black", linewidth=1.1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.4g}")
    top.legend(frameon=False, fontsize=8)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _named(row: ImageRow) -> str:
    return row.kind if row.defective else "good"


def _show(axes: Any, image: np.ndarray) -> None:
    small = max(image.shape[:2]) < _CURVED
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if small else "antialiased")


def _colour_bar(figure: Any, drawn: Any, grid: Any, pixel_threshold: float, heat: tuple[float, float]) -> None:
    bar = figure.colorbar(drawn, ax=list(grid), fraction=0.02, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
    if heat[0] < pixel_threshold < heat[1]:
        bar.ax.axhline(pixel_threshold, color=FOUND, linewidth=1.5)


def _outline(axes: Any, example: Example, pixel_threshold: float) -> None:
    # A border of its own level closes contours that run out of the image.
    if example.mask is not None and example.mask.any():
        _contour(axes, example.mask.astype(np.float32), 0.5, TRUTH, 0.0)
    if math.isfinite(pixel_threshold) and (example.map > pixel_threshold).any():
        _contour(axes, example.map, pixel_threshold, FOUND, float(min(example.map.min(), pixel_threshold)) - 1e-6)


def _contour(axes: Any, values: np.ndarray, level: float, colour: str, outside: float) -> None:
    height, width = values.shape
    padded = np.pad(values, 1, constant_values=outside)
    axes.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), padded, [level], colors=colour, linewidths=1.3)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
