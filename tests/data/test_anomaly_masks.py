"""Masks: what counts as one, and that they stay true to their image when both change size."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zoo.data.masks import check_size, fit_image, fit_mask, inner_size, pad_to, read_mask, size_of
from zoo.errors import UsageError

TRUTH = np.zeros((10, 12), dtype=bool)
TRUTH[2:5, 3:9] = True


def picture(mode: str) -> Image.Image:
    grey = TRUTH.astype(np.uint8) * 255
    if mode == "I;16":
        return Image.fromarray(TRUTH.astype(np.uint16) * 65535)
    if mode == "16 bit of small numbers":
        return Image.fromarray(TRUTH.astype(np.uint16))
    if mode == "small numbers":
        return Image.fromarray(TRUTH.astype(np.uint8))
    if mode == "red":
        return Image.fromarray(np.dstack([grey, grey * 0, grey * 0]))
    if mode == "P":
        image = Image.new("P", (12, 10))
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.putdata(TRUTH.astype(np.uint8).ravel().tolist())
        return image
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize(
    "mode", ["L", "1", "RGB", "RGBA", "LA", "P", "I;16", "16 bit of small numbers", "small numbers", "red"]
)
def test_masks_of_every_kind(tmp_path, mode):
    path = str(tmp_path / "mask.png")
    picture(mode).save(path)
    found = read_mask(path, "image.png", (10, 12))
    assert found.dtype == bool
    assert np.array_equal(found, TRUTH)


def test_mask_that_is_not_binary_is_refused_and_numbered_ones_are_not(tmp_path):
    values = TRUTH.astype(np.uint8) * 255
    values[7, 7] = 128
    path = str(tmp_path / "mask.png")
    Image.fromarray(values).save(path)
    with pytest.raises(UsageError, match=r"mask\.png' is not binary: beside 0 and 255 it has values such as 128"):
        read_mask(path, "image.png", (10, 12))
    assert np.array_equal(read_mask(path, "image.png", (10, 12), numbered=True), values > 0)


def test_jpeg_mask_is_refused(tmp_path):
    path = str(tmp_path / "mask.jpg")
    picture("L").save(path, quality=70)
    with pytest.raises(UsageError, match=r"mask\.jpg' is not binary.*Save it as PNG"):
        read_mask(path, "image.png", (10, 12))


def test_mask_of_another_size_is_refused(tmp_path):
    mask, image = str(tmp_path / "mask.png"), str(tmp_path / "image.png")
    picture("L").save(mask)
    Image.new("L", (10, 12)).save(image)
    words = r"mask\.png' has 10 x 12 pixels .*image\.png' has 12 x 10"
    with pytest.raises(UsageError, match=words):
        read_mask(mask, image, (12, 10))
    with pytest.raises(UsageError, match=words):
        check_size(mask, image)


def test_header_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    for orientation, size in ((1, (10, 12)), (3, (10, 12)), (6, (12, 10))):
        exif[0x0112] = orientation
        picture("L").save(tmp_path / "a.jpg", exif=exif)
        assert size_of(tmp_path / "a.jpg") == size


def test_all_or_nothing_of_an_image(tmp_path):
    for value in (0, 255):
        Image.new("L", (12, 10), value).save(tmp_path / "m.png")
        assert read_mask(str(tmp_path / "m.png"), "i", (10, 12)).all() == (value == 255)


@pytest.mark.parametrize("size", [(24, 30), (7, 5), (64, 80), (20, 25), (13, 70)])
def test_shrunk_masks_keep_pixels_covered_by_half(size):
    """Against overlaps of intervals, pixel by pixel, in float64."""
    mask = np.random.default_rng(0).random((40, 50)) < 0.45
    mask[5:20, 10:35] = True

    def shares(given, wanted):
        edges = np.arange(wanted + 1) * given / wanted
        return np.array(
            [
                np.clip(np.minimum(b, np.arange(given) + 1) - np.maximum(a, np.arange(given)), 0, 1) / (b - a)
                for a, b in itertools.pairwise(edges)
            ]
        )

    cover = shares(40, size[0]) @ mask.astype(np.float64) @ shares(50, size[1]).T
    found = fit_mask(mask, size)
    assert found.dtype == bool
    clear = np.abs(cover - 0.5) > 1e-9  # where the order of sums cannot decide otherwise
    assert np.array_equal(found[clear], (cover > 0.5)[clear])
    assert clear.mean() > 0.5
    assert found[~clear].all()


def test_thin_defects_do_not_vanish():
    mask = np.zeros((100, 100), dtype=bool)
    mask[37, 20:60] = True
    found = fit_mask(mask, (10, 10))
    assert found.sum() == 4
    assert found[3, 2:6].all()
    assert not fit_mask(np.zeros((100, 100), dtype=bool), (10, 10)).any()


@pytest.mark.parametrize("size", [(16, 20), (60, 33)])
def test_images_are_resized_with_an_antialiased_triangle(size):
    """Against torch's antialiased bilinear filter in float64; Pillow rounds to whole numbers after either axis."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    exact = F.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), size, mode="bilinear", antialias=True
    )[0].permute(1, 2, 0)
    assert np.abs(fit_image(Image.fromarray(pixels), size) - exact.numpy()).max() <= 1.5


def test_padding_keeps_the_shape_at_the_top_left():
    assert inner_size((100, 200), (64, 64), "pad") == (32, 64)
    assert inner_size((200, 100), (64, 64), "pad") == (64, 32)
    assert inner_size((10, 10), (64, 96), "pad") == (64, 64)
    assert inner_size((1, 5000), (64, 64), "pad") == (1, 64)
    assert inner_size((100, 200), (64, 64), "stretch") == (64, 64)
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert np.array_equal(pad_to(pixels, (4, 5), "edge")[..., 0], np.pad(pixels[..., 0], ((0, 2), (0, 2)), mode="edge"))
    assert pad_to(np.ones((2, 3), dtype=bool), (4, 5), "constant").sum() == 6
