"""Drawn defects: the same for the same seed, visible, and nowhere but in their masks; masks move with images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zoo.data.augmentation import Augmentation
from zoo.data.synthetic import VISIBLE, draw_defect


def backgrounds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 230, 96)[None, :, None] * np.ones((80, 1, 3))
    return {
        "noise": rng.integers(0, 256, (80, 96, 3), dtype=np.uint8),
        "black": np.zeros((80, 96, 3), dtype=np.uint8),
        "white": np.full((80, 96, 3), 255, dtype=np.uint8),
        "middle": np.full((80, 96, 3), 128, dtype=np.uint8),
        "grey": rng.integers(90, 120, (64, 64, 1), dtype=np.uint8),
        "ramp": ramp.astype(np.uint8),
    }


@pytest.mark.parametrize("name", backgrounds())
def test_nothing_outside_the_mask_changes_and_inside_it_shows(name):
    image = backgrounds()[name]
    kept = image.copy()
    sizes = []
    for seed in range(150):
        spoilt, mask = draw_defect(image, seed)
        assert np.array_equal(image, kept)
        assert (spoilt.dtype, spoilt.shape, mask.dtype, mask.shape) == (np.uint8, image.shape, bool, image.shape[:2])
        change = np.abs(spoilt.astype(int) - image).max(-1)
        assert not change[~mask].any()
        # Half a level below the bound, as rounding to whole numbers may cost.
        assert change[mask].mean() >= VISIBLE - 0.5
        sizes.append(mask.sum())
    # From specks to about a tenth of the area: boxes of 4 to 30 % of the shorter side.
    assert min(sizes) >= 1
    assert max(sizes) <= 0.1 * mask.size
    assert max(sizes) > 20 * min(sizes)


def test_grey_stays_grey():
    """Colour in a picture without any would be found too easily."""
    for name in ("black", "middle", "ramp"):
        for seed in range(30):
            spoilt, _ = draw_defect(backgrounds()[name], seed)
            assert (spoilt == spoilt[..., :1]).all()


def test_a_function_of_the_seed_alone():
    image = backgrounds()["noise"]
    first = draw_defect(image, 7)
    np.random.default_rng(1).random()
    np.random.seed(3)
    again, other = draw_defect(image, 7), draw_defect(image, 8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_size_goes_by_the_side_given():
    """In a large image looked at by tiles, defects are as large as they would be in a tile."""
    image = np.full((400, 600, 3), 100, dtype=np.uint8)
    for seed in range(40):
        _, mask = draw_defect(image, seed, side=100)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert rows[-1] - rows[0] < 30
        assert columns[-1] - columns[0] < 30


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (8, 200)])
def test_tiny_images(size):
    image = np.full((*size, 3), 60, dtype=np.uint8)
    for seed in range(20):
        spoilt, mask = draw_defect(image, seed)
        assert mask.any()
        assert not (spoilt != image).any(-1)[~mask].any()


def marked() -> tuple[np.ndarray, np.ndarray]:
    """Dark, with a bright lump that the mask marks."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[6:16, 30:48] = True
    image = np.full((40, 60, 3), 30, dtype=np.uint8)
    image[mask] = 220
    return image, mask


def test_flips_are_those_of_numpy():
    image, mask = marked()
    turned, moved = Augmentation(hflip=1.0)(image, mask, 0)
    assert np.array_equal(turned, image[:, ::-1])
    assert np.array_equal(moved, mask[:, ::-1])
    turned, moved = Augmentation(vflip=1.0)(image, mask, 0)
    assert np.array_equal(turned, image[::-1])
    assert np.array_equal(moved, mask[::-1])


def test_masks_turn_with_their_images():
    image, mask = marked()
    augment = Augmentation(hflip=0.5, vflip=0.5, rotate=25.0)
    for seed in range(20):
        turned, moved = augment(image, mask, seed)
        assert (turned.shape, turned.dtype, moved.dtype) == (image.shape, np.uint8, bool)
        bright = turned[..., 0] > 125  # half way between the lump and its surroundings: its outline
        # Bilinear and nearest may differ along the outline of about 56 pixels, not in the area of 180.
        assert (bright != moved).sum() <= 28
        assert (bright & moved).sum() > 120


def test_light_changes_images_and_not_masks():
    image, mask = marked()
    changed, same = Augmentation(brightness=0.3, contrast=0.2)(image, mask, 1)
    assert not np.array_equal(changed, image)
    assert np.array_equal(same, mask)


def test_augmentation_is_a_function_of_its_seed():
    image, mask = marked()
    options = {"hflip": 0.5, "rotate": 20.0, "brightness": 0.2}
    one, two = Augmentation(**options), Augmentation(**options)
    for seed in (0, 5, 2**62):
        two(image, mask, seed + 1)
        assert np.array_equal(one(image, mask, seed)[0], two(image, mask, seed)[0])
    assert len({one(image, mask, seed)[0].tobytes() for seed in range(8)}) > 4


def test_grey_images_keep_their_channel():
    image, mask = marked()
    changed, _ = Augmentation(hflip=1.0, brightness=0.1, rotate=5.0)(image[..., :1], mask, 0)
    assert changed.shape == (40, 60, 1)


@pytest.mark.slow
def test_albumentations_is_imported_only_when_used_and_asks_no_network():
    program = (
        "import sys, os, zoo.data\n"
        "assert 'albumentations' not in sys.modules and 'cv2' not in sys.modules\n"
        "from zoo.data.augmentation import Augmentation\n"
        "Augmentation(hflip=0.5)\n"
        "assert 'albumentations' in sys.modules and os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
