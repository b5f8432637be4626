"""The two pictures of a classification run: which classes are mixed up, and the worst mistakes themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ANNOTATED = 20
_NAMED = 120
_LISTED = 18


@dataclass
class Mistake:
    """One image that was given a wrong class. image: (H, W) or (H, W, 3) uint8."""

    image: np.ndarray
    true: int
    predicted: int
    probability: float


def draw_confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Writes the confusion matrix (C, C), rows true, columns predicted, coloured by the share of the row."""
    from matplotlib.figure import Figure

    classes = len(class_names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(1.6 + 0.42 * classes, 4.5, 14))
    figure = Figure(figsize=(side + 4.2, side), layout="constrained", dpi=110)
    axes, table = figure.subplots(1, 2, width_ratios=[side, 4.2])
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= _NAMED:
        size = float(np.clip(11 - classes / 12, 5, 9))
        names = [shorten(name, 18) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=90 if classes > 6 else 0, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
    if classes <= _ANNOTATED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.55 else "black"
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    _list_confusions(table, counts, class_names)
    total = counts.sum()
    right = np.trace(counts)
    figure.suptitle(f"{title}: {right:.0f} of {total:.0f} right ({right / max(total, 1):.2%})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_mistakes(mistakes: Sequence[Mistake], class_names: Sequence[str], path: Path, title: str) -> None:
    """Writes a grid of the mistakes, in the order given, each with its true and predicted class."""
    from matplotlib.figure import Figure

    columns = min(6, max(3, len(mistakes)))
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.55 * rows + 0.5), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        small = max(mistake.image.shape[:2]) < 64
        axes.imshow(mistake.image, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if small else "antialiased")
        axes.set_title(
            f"{shorten(class_names[mistake.predicted], 22)} {mistake.probability:.0%}\n"
            f"is {shorten(class_names[mistake.true], 22)}",
            fontsize=8,
        )
    if not mistakes:
        grid[0, columns // 2].text(0.5, 0.5, "no mistakes", ha="center", va="center", fontsize=14)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _list_confusions(axes, counts: np.ndarray, class_names: Sequence[str]) -> None:
    axes.axis("off")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    lines = []
    for index in order:
        true, predicted = np.unravel_index(index, wrong.shape)
        if wrong[true, predicted] == 0:
            break
        names = f"{shorten(class_names[true], 16)} → {shorten(class_names[predicted], 16)}"
        lines.append(f"{int(wrong[true, predicted]):4d}  {names}")
    text = "\n".join(lines) or "none"
    axes.text(0, 1, "most frequent confusions\n(true → predicted)", va="top", fontsize=9, weight="bold")
    axes.text(0, 0.93 if counts.shape[0] > 12 else 0.86, text, va="top", fontsize=8, family="monospace")


def shorten(name: str, limit: int) -> str:
    """A name of at most so many letters."""
    return name if len(name) <= limit else name[: limit - 1] + "…"
