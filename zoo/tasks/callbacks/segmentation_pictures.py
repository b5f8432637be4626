"""Pictures of segmented images: image | truth | prediction | error, with the colours of the classes below."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.tasks.callbacks.pictures import shorten
from zoo.tasks.callbacks.segmentation_gallery import Example

WRONG = (255, 59, 48)
# In stripes: whatever colour alone stood for no class, a palette may give it to one.
NO_CLASS = ((96, 96, 96), (192, 192, 192))
_NAMED = 24  # classes in a legend; of more the largest are named
_LONGEST = 32  # letters of a name in the legend
_LETTER = 0.068  # inches, of the legend's font; a name's colour and the gap to the next take `_ASIDE`
_ASIDE = 0.7


def draw_example(
    example: Example, path: Path, class_names: Sequence[str], palette: Sequence[Sequence[int]], ignore_index: int
) -> None:
    """Writes image | truth | prediction | error of one example; pixels without a class are striped in grey.

    The error shows wrong pixels in red over a pale image.
    """
    from matplotlib.figure import Figure

    height, width = example.truth.shape
    rows, columns = (4, 1) if width > 2.5 * height else (2, 2) if width > 1.2 * height else (1, 4)
    panel = float(np.clip(2.9 * (width / height) ** 0.5, 1.7, 6.0))
    shown = classes_shown(example, len(class_names))
    patches = _legend(example, shown, class_names, palette, ignore_index)
    longest = max(len(patch.get_label()) for patch in patches)
    lines = -(-len(patches) // max(1, int(columns * panel / (_ASIDE + _LETTER * longest))))
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
    legend = figure.legend(
        handles=patches, loc="outside lower center", ncols=-(-len(patches) // lines), fontsize=8, frameon=False
    )
    name = "…" + example.path[-59:] if len(example.path) > 60 else example.path
    # Names are names: what stands between two dollars is no formula.
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle(f"mIoU {example.miou:.2%}: {name}", fontsize=9, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def coloured(classes: np.ndarray, palette: Sequence[Sequence[int]], ignore_index: int) -> np.ndarray:
    """uint8 (H, W, 3) of class numbers (H, W)."""
    ignored = classes == ignore_index
    pixels = np.array(palette, dtype=np.uint8)[np.where(ignored, 0, classes)]
    return _striped(pixels, ignored)


def errors(example: Example, ignore_index: int) -> np.ndarray:
    """uint8 (H, W, 3): a pale grey image, wrong pixels red, those without a class striped."""
    image = example.image if example.image.ndim == 2 else example.image.mean(2)
    pale = (170 + image * (85 / 255)).astype(np.uint8)
    pixels = np.repeat(pale[..., None], 3, axis=2)
    pixels[example.truth != example.predicted] = WRONG
    return _striped(pixels, example.truth == ignore_index)


def _striped(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The picture with stripes from corner to corner where bool (H, W) says so."""
    width = max(1, max(where.shape) // 80)
    rows, columns = np.indices(where.shape)
    stripes = np.array(NO_CLASS, dtype=np.uint8)[(rows + columns) // width % 2]
    return np.where(where[..., None], stripes, pixels)


def classes_shown(example: Example, num_classes: int) -> list[int]:
    """Numbers of the classes that truth or prediction show, ascending; the largest of very many."""
    both = np.concatenate([example.truth.ravel(), example.predicted.ravel()])
    counts = np.bincount(both[(both >= 0) & (both < num_classes)], minlength=num_classes)
    largest = np.argsort(-counts, kind="stable")[:_NAMED]
    return sorted(int(number) for number in largest if counts[number])


def _legend(
    example: Example,
    shown: Sequence[int],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    ignore_index: int,
) -> list[Any]:
    """A field of colour with a name for each class that is shown, for pixels without one, and for wrong ones."""
    from matplotlib.patches import Patch

    # matplotlib leaves out of a legend what begins with "_", as labelme's "_background_" does.
    names = [(" " if class_names[n].startswith("_") else "") + shorten(class_names[n], _LONGEST) for n in shown]
    patches = [
        Patch(facecolor=_matplotlib(palette[number]), edgecolor="#888888", label=name)
        for number, name in zip(shown, names, strict=True)
    ]
    if (example.truth == ignore_index).any():
        dark, pale = (_matplotlib(colour) for colour in NO_CLASS)
        patches.append(Patch(facecolor=dark, edgecolor=pale, hatch="//////", label="no class"))
    return [*patches, Patch(facecolor=_matplotlib(WRONG), edgecolor="#888888", label="wrong")]


def _show(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _matplotlib(colour: Sequence[int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
