"""Draw the sample images of data/samples/ from a seed; the same bytes every time.

    python tools/make_samples.py [FOLDER]

classification/{train,val}/CLASS/NN.jpg   64 x 64; six patterns with random colours, polarity, size, place and light
anomaly/fabric/...                        128 x 128; MVTec layout, woven texture with scratches, blobs and dents
segmentation/{train,val}/{images,masks}/  96 x 96; discs, bars and triangles on texture, masks as class numbers
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SEED = 20261123
DEFAULT = Path(__file__).resolve().parent.parent / "data" / "samples"


def noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth random field (size, size) in [0, 1] with about `cells` bumps a side."""
    small = Image.fromarray((rng.random((cells + 2, cells + 2)) * 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def coordinates(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, turned and moved at random."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) - size * rng.random(2)[:, None, None].astype(np.float32)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    x, _ = coordinates(rng, size)
    return np.sin(2 * np.pi * x / rng.uniform(7, 12)) > 0


def checks(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = coordinates(rng, size)
    step = rng.uniform(8, 12)
    return (np.sin(2 * np.pi * x / step) > 0) ^ (np.sin(2 * np.pi * y / step) > 0)


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = coordinates(rng, size)
    step = rng.uniform(9, 13)
    return (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (0.3 * step) ** 2


def rings(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size * rng.uniform(0.3, 0.7, 2)[:, None, None]
    return np.sin(2 * np.pi * np.hypot(x, y) / rng.uniform(8, 12)) > 0


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = coordinates(rng, size)
    height, width = rng.uniform(7, 9), rng.uniform(16, 20)
    row = np.floor(y / height)
    return (y % height < 2) | ((x + row * width / 2) % width < 2)


def blots(rng: np.random.Generator, size: int) -> np.ndarray:
    field = noise(rng, size, int(rng.integers(7, 10)))
    return field > np.median(field)


PATTERNS = {f.__name__: f for f in (stripes, checks, dots, rings, bricks, blots)}


def two_colours(rng: np.random.Generator) -> np.ndarray:
    """Two RGB colours (2, 3) that differ clearly in light; which one is lighter is random."""
    while True:
        pair = rng.uniform(20, 235, (2, 3))
        if abs(np.diff(pair.mean(1))[0]) > 45:
            return pair


def pattern_image(rng: np.random.Generator, name: str, size: int = 64) -> Image.Image:
    """A surface with one pattern under uneven light and grain."""
    shape = PATTERNS[name](rng, size).astype(np.float32)[..., None]
    first, second = two_colours(rng)
    pixels = first * shape + second * (1 - shape)
    light = 0.75 + 0.5 * noise(rng, size, 2)[..., None]
    pixels = pixels * light + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_classification(folder: Path, rng: np.random.Generator) -> None:
    for split, count in (("train", 120), ("val", 30)):
        for name in PATTERNS:
            target = folder / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pattern_image(rng, name).save(target / f"{number:03d}.jpg", quality=72)


def weave(rng: np.random.Generator, size: int = 128) -> Image.Image:
    """A woven grey-brown cloth."""
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 8, 2)[:, None, None]
    warp, weft = np.sin(2 * np.pi * x / 8), np.sin(2 * np.pi * y / 8)
    cloth = np.where(warp * weft > 0, warp, weft)
    tone = np.array([150, 138, 118]) * (0.92 + 0.16 * noise(rng, size, 3)[..., None])
    pixels = tone + 16 * cloth[..., None] + rng.normal(0, 4, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def scratch(rng: np.random.Generator, mask: ImageDraw.ImageDraw, size: int) -> None:
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.1, 0.9) * size
    start = rng.uniform(0.15, 0.85, 2) * size
    points = [
        tuple(start + t * length * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, 2, 2))
        for t in np.linspace(-0.5, 0.5, 6)
    ]
    mask.line(points, fill=255, width=int(rng.integers(1, 4)))


def blob(rng: np.random.Generator, mask: ImageDraw.ImageDraw, size: int) -> None:
    radius = np.exp(rng.uniform(np.log(2), np.log(0.22 * size)))
    centre = rng.uniform(0.2, 0.8, 2) * size
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    reach = radius * rng.uniform(0.7, 1.2, 14)
    mask.polygon(
        [tuple(centre + r * np.array([np.cos(a), np.sin(a)])) for a, r in zip(angles, reach, strict=True)], fill=255
    )


def dent(rng: np.random.Generator, mask: ImageDraw.ImageDraw, size: int) -> None:
    half = rng.uniform(3, 0.16 * size, 2)
    centre = rng.uniform(0.2, 0.8, 2) * size
    mask.ellipse([tuple(centre - half), tuple(centre + half)], fill=255)


DEFECTS = {"scratch": scratch, "blob": blob, "dent": dent}


def spoil(rng: np.random.Generator, image: Image.Image, kind: str) -> tuple[Image.Image, Image.Image]:
    """A defect on a good image, and its mask (0 or 255)."""
    mask = Image.new("L", image.size, 0)
    DEFECTS[kind](rng, ImageDraw.Draw(mask), image.width)
    pixels, share = np.asarray(image, np.float32), np.asarray(mask, np.float32)[..., None] / 255
    if kind == "scratch":
        other = np.full_like(pixels, 225)
    elif kind == "blob":
        other = np.zeros_like(pixels) + rng.uniform(20, 90, 3)
    else:
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(3)), np.float32)[..., None] / 255
        other = pixels * (1 - 0.55 * soft)
    mixed = pixels * (1 - share) + other * share
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8)), mask


def make_anomaly(folder: Path, rng: np.random.Generator) -> None:
    good = {"train": 40, "test": 12}
    for split, count in good.items():
        target = folder / "fabric" / split / "good"
        target.mkdir(parents=True)
        for number in range(count):
            weave(rng).save(target / f"{number:03d}.jpg", quality=80)
    for kind in DEFECTS:
        target, truth = folder / "fabric" / "test" / kind, folder / "fabric" / "ground_truth" / kind
        target.mkdir(parents=True)
        truth.mkdir(parents=True)
        for number in range(8):
            image, mask = spoil(rng, weave(rng), kind)
            image.save(target / f"{number:03d}.jpg", quality=80)
            mask.save(truth / f"{number:03d}_mask.png", optimize=True)


SHAPES = ("background", "disc", "bar", "triangle")


def scene(rng: np.random.Generator, size: int = 96) -> tuple[Image.Image, Image.Image]:
    """Two to four shapes on a textured ground, and their classes."""
    ground = two_colours(rng)
    field = noise(rng, size, 8)[..., None]
    pixels = Image.fromarray((ground[0] * field + ground[1] * (1 - field)).astype(np.uint8))
    classes = Image.new("L", pixels.size, 0)
    for _ in range(int(rng.integers(2, 5))):
        label = int(rng.integers(1, len(SHAPES)))
        colour = tuple(int(v) for v in rng.uniform(20, 235, 3))
        centre, radius, angle = rng.uniform(0.15, 0.85, 2) * size, rng.uniform(5, 20), rng.uniform(0, 2 * np.pi)
        for image, fill in ((pixels, colour), (classes, label)):
            draw = ImageDraw.Draw(image)
            if label == 1:
                draw.ellipse([*(centre - radius), *(centre + radius)], fill=fill)
                continue
            if label == 2:
                corners = np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
            else:
                corners = np.array([(np.cos(a), np.sin(a)) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)])
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            draw.polygon([tuple(centre + radius * 1.3 * (turn @ corner)) for corner in corners], fill=fill)
    grain = np.asarray(pixels, np.float32) + rng.normal(0, 6, (size, size, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8)), classes


def make_segmentation(folder: Path, rng: np.random.Generator) -> None:
    for split, count in (("train", 48), ("val", 16)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            image, mask = scene(rng)
            image.save(folder / split / "images" / f"{number:03d}.jpg", quality=80)
            mask.save(folder / split / "masks" / f"{number:03d}.png", optimize=True)
    (folder / "classes.txt").write_text("\n".join(SHAPES) + "\n")


MAKERS = {"classification": make_classification, "anomaly": make_anomaly, "segmentation": make_segmentation}


def make(folder: Path) -> None:
    """Writes all three sets under `folder`, each from its own stream of the seed."""
    for number, (name, maker) in enumerate(MAKERS.items()):
        maker(folder / name, np.random.default_rng([SEED, number]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT)
    folder = parser.parse_args(argv).folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty; remove it first")
    make(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{sum(path.is_file() for path in folder.rglob('*'))} files, {size / 1e6:.2f} MB in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
