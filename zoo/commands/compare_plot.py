"""The picture that `zoo compare` leaves: accuracy against what it costs, every point with its number."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLOTTED = {
    "images_per_second": "training images/s",
    "gmacs": "GMACs of one image, forward",
    "parameters": "parameters, millions",
    "peak_memory_gb": "peak memory in training, GB",
}
_FONT = 8
# Points, of 1/72 inch: half a dot, and how far from its dot a number may stand; further than _NEAR it gets a line.
_DOT = 2.5
_DISTANCES = (8.0, 13.0, 19.0, 26.0, 34.0, 44.0, 56.0)
_NEAR = 8.0
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, heading: str) -> None:
    """Writes the accuracy against speed, multiply-adds, parameters and memory; a list beside it names the points."""
    from matplotlib.figure import Figure

    done = [row for row in rows if row["seeds"]]
    figure = Figure(figsize=(17, 11), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 3, width_ratios=[3, 3, 1.4])
    y = [row["accuracy"] for row in done]
    drawn = []
    for place, (key, label) in enumerate(_PLOTTED.items()):
        axes = figure.add_subplot(grid[place // 2, place % 2])
        x = [float("nan") if row[key] is None else row[key] for row in done]
        spread = [row["spread"] or 0.0 for row in done]
        axes.errorbar(x, y, yerr=spread, fmt="o", markersize=2 * _DOT, elinewidth=1, ecolor="0.75")
        axes.set(xlabel=label, ylabel="top-1 %")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.3)
        axes.margins(0.07)
        drawn.append((axes, x))
    names = figure.add_subplot(grid[:, 2])
    names.axis("off")
    lines = [f"{number:>2}  {row['accuracy']:5.2f}  {row['name']}" for number, row in enumerate(done, 1)]
    names.text(0, 1, "\n".join(lines), family="monospace", fontsize=9, va="top")
    figure.suptitle(heading)
    # Where axes lie is known once the layout is; from then on it stays.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, x in drawn:
        _number(axes, x, y, 72 / figure.dpi)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _number(axes: Any, x: Sequence[float], y: Sequence[float], scale: float) -> None:
    """Writes the numbers of points beside them; `scale` makes points of pixels."""
    found = labels(x, y)
    if not found:
        return

    def place(points: Sequence[Point]) -> list[Point]:
        return [(px * scale, py * scale) for px, py in axes.transData.transform(points)]

    dots = place([point for point in zip(x, y, strict=True) if point[0] == point[0]])
    frame = axes.get_window_extent()
    inside = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    for (point, text), (dx, dy) in zip(
        found, arrange(place([point for point, _ in found]), [text for _, text in found], dots, inside), strict=True
    ):
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            text,
            point,
            xytext=(dx, dy),
            textcoords="offset points",
            fontsize=_FONT,
            ha="center",
            va="center",
            arrowprops=line if math.hypot(dx, dy) > 2 * _NEAR else None,
        )


def box_of(centre: Point, text: str) -> Box:
    """Left, bottom, right and top of a text around a point, a little more than it takes."""
    width, height = 0.62 * _FONT * len(text) + 1, _FONT + 1
    return centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(down, 0.0)


def arrange(points: Sequence[Point], texts: Sequence[str], dots: Sequence[Point], inside: Box) -> list[Point]:
    """Offsets of texts from their points, so that none lies on another, on a dot or outside, as far as there is room.

    The nearest free place counts, to the upper right first; where none is free, the one that covers least.
    """
    taken = [(px - _DOT, py - _DOT, px + _DOT, py + _DOT) for px, py in dots]
    found: list[Point] = []
    for (px, py), text in zip(points, texts, strict=True):
        wide = box_of((0.0, 0.0), text)[2]
        tried: list[tuple[float, Point, Box]] = []
        for distance in _DISTANCES:
            for step in range(16):
                angle = math.pi / 4 + step * math.pi / 8
                # A long text is pushed aside by half of itself.
                offset = (math.cos(angle) * (distance + wide - _NEAR / 2), math.sin(angle) * distance)
                box = box_of((px + offset[0], py + offset[1]), text)
                lost = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, inside)
                tried.append((sum(_overlap(box, other) for other in taken) + lost, offset, box))
            # Rounding aside.
            if tried and min(tried)[0] < 1e-6:
                break
        best = next((one for one in tried if one[0] < 1e-6), min(tried))
        found.append(best[1])
        taken.append(best[2])
    return found


def labels(x: Sequence[float], y: Sequence[float]) -> list[tuple[Point, str]]:
    """Where to write the numbers of points, counted from 1: those within a hundredth of the axes share a label."""
    known = [[value for value in values if value == value] or [0.0] for values in (x, y)]
    reach = [(max(values) - min(values) or 1.0) / 100 for values in known]
    found: list[tuple[tuple[float, float], list[int]]] = []
    for number, point in enumerate(zip(x, y, strict=True), 1):
        if point[0] != point[0]:
            continue  # its multiply-adds are not known
        for place, numbers in found:
            if abs(place[0] - point[0]) <= reach[0] and abs(place[1] - point[1]) <= reach[1]:
                numbers.append(number)
                break
        else:
            found.append((point, [number]))
    return [(place, ", ".join(str(number) for number in numbers)) for place, numbers in found]
