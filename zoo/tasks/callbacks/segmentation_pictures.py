"""Pictures of segmented images: image | truth | prediction | error, with the colours of the classes below."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.tasks.callbacks.segmentation_gallery import Example

WRONG = (255, 59, 48)
NO_CLASS = (128, 128, 128)
_NAMED = 24  # classes in a legend; of more the largest are named


def draw_example(
    example: Example, path: Path, class_names: Sequence[str], palette: Sequence[Sequence[int]], ignore_index: int
) -> None:
    """Writes image | truth | prediction | error of one example; pixels without a class are grey.

    The error shows wrong pixels in red over a pale image.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = example.truth.shape
    rows, columns = (4, 1) if width > 2.5 * height else (2, 2) if width > 1.2 * height else (1, 4)
    panel = float(np.clip(2.9 * (width / height) ** 0.5, 1.7, 6.0))
    shown = classes_shown(example, len(class_names))
    lines = -(-(len(shown) + 2) // max(3, int(columns * panel / 1.35)))
    size = (columns * panel + 0.2, rows * (panel * height / width + 0.3) + 0.45 + 0.21 * lines)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    panels = {
        "image": example.image,
        "truth": coloured(example.truth, palette, ignore_index),
        "prediction": coloured(example.predicted, palette, ignore_index),
        "error": errors(example, ignore_index),
    }
    for axes, (title, pixels) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize=9, color="#444444", pad=3)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#bbbbbb", linewidth=0.6)
        _show(axes, pixels)
    patches = [Patch(facecolor=_matplotlib(palette[n]), edgecolor="#888888", label=class_names[n]) for n in shown]
    if (example.truth == ignore_index).any():
        patches.append(Patch(facecolor=_matplotlib(NO_CLASS), edgecolor="#888888", label="no class"))
    patches.append(Patch(facecolor=_matplotlib(WRONG), edgecolor="#888888", label="wrong"))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=-(-len(patches) // lines), fontsize=8, frameon=False
    )
    name = "…" + example.path[-59:] if len(example.path) > 60 else example.path
    figure.suptitle(f"mIoU {example.miou:.2%}: {name}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def coloured(classes: np.ndarray, palette: Sequence[Sequence[int]], ignore_index: int) -> np.ndarray:
    """uint8 (H, W, 3) of class numbers (H, W)."""
    colours = np.array([*palette, NO_CLASS], dtype=np.uint8)
    return colours[np.where(classes == ignore_index, len(palette), classes)]


def errors(example: Example, ignore_index: int) -> np.ndarray:
    """uint8 (H, W, 3): a pale grey image, wrong pixels red, those without a class grey."""
    image = example.image if example.image.ndim == 2 else example.image.mean(2)
    pale = (170 + image * (85 / 255)).astype(np.uint8)
    pixels = np.repeat(pale[..., None], 3, axis=2)
    ignored = example.truth == ignore_index
    pixels[ignored] = NO_CLASS
    pixels[(example.truth != example.predicted) & ~ignored] = WRONG
    return pixels


def classes_shown(example: Example, num_classes: int) -> list[int]:
    """Numbers of the classes that truth or prediction show, ascending; the largest of very many."""
    both = np.concatenate([example.truth.ravel(), example.predicted.ravel()])
    counts = np.bincount(both[(both >= 0) & (both < num_classes)], minlength=num_classes)
    largest = np.argsort(-counts, kind="stable")[:_NAMED]
    return sorted(int(number) for number in largest if counts[number])


def _show(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _matplotlib(colour: Sequence[int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
