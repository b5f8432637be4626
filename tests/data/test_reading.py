"""Damaged files, every kind of picture, and the pixels of evaluation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from zoo.data import ImageClassification
from zoo.data.images import open_image
from zoo.errors import UsageError
from zoo.export import predictor

TWO = {"train/a": 6, "train/b": 6, "val/a": 3, "val/b": 3}


def make(root, **options):
    return ImageClassification(str(root), **({"img_size": 8, "batch_size": 4, "num_workers": 0} | options))


def spoil(file) -> str:
    file.write_bytes(file.read_bytes()[:60])
    return str(file)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_drops_names_and_counts_a_damaged_image_once(write, workers):
    root = write(TWO)
    bad = spoil(root / "train" / "a" / "02.png")
    data = make(root, num_workers=workers)
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match="left out, cannot be read") as warned:
        counts = [sum(len(targets) for _, targets in loader) for _ in range(2)]
    assert counts == [11, 11]
    assert list(data.skipped) == [bad]
    assert data.skipped[bad]
    assert sum("left out" in str(one.message) for one in warned) == 1


def test_evaluation_leaves_a_damaged_image_out_and_substitutes_nothing(write):
    root = write(TWO)
    whole = torch.cat([images for images, _ in make(root).val_dataloader()])
    spoil(root / "val" / "a" / "01.png")
    data = make(root)
    with pytest.warns(UserWarning, match="left out"):
        batches = list(data.val_dataloader())
    assert torch.cat([targets for _, targets in batches]).tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_stops_with_the_name_of_the_file(write, workers):
    root = write(TWO)
    spoil(root / "train" / "b" / "03.png")
    with pytest.raises(UsageError, match=r"b/03\.png cannot be read: .*--data.on_error skip"):
        list(make(root, on_error="raise", num_workers=workers).train_dataloader())


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_every_kind_of_damage_is_skipped(write, content):
    root = write(TWO)
    (root / "val" / "b" / "00.png").write_bytes(content)
    data = make(root)
    with pytest.warns(UserWarning, match="left out"):
        assert sum(len(targets) for _, targets in data.val_dataloader()) == 5
    assert len(data.skipped) == 1


def test_batch_of_damaged_images_alone_is_left_out(write):
    root = write(TWO)
    for file in (root / "val" / "a").iterdir():
        spoil(file)
    data = make(root, batch_size=3)
    with pytest.warns(UserWarning, match="left out"):
        batches = list(data.val_dataloader())
    assert [targets.tolist() for _, targets in batches] == [[1, 1, 1]]
    assert len(data.skipped) == 3


GREY = np.random.default_rng(0).integers(0, 256, (10, 12), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (10, 12, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601 grey in float64."""
    return pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def test_grey_becomes_three_equal_channels():
    pixels = np.asarray(open_image(encoded(Image.fromarray(GREY), "PNG"), 3))
    assert np.array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_transparency_is_dropped():
    rgba = np.dstack([COLOUR, GREY])
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(rgba), "PNG"), 3)), COLOUR)


def test_palette_is_looked_up():
    numbers = GREY % 4
    table = np.array([[255, 0, 0], [0, 255, 0], [7, 8, 9], [200, 100, 50]], np.uint8)
    image = Image.fromarray(numbers, "L")
    image.putpalette(table.tobytes())
    for options in ({}, {"transparency": 1}):
        assert np.array_equal(np.asarray(open_image(encoded(image, "PNG", **options), 3)), table[numbers])


@pytest.mark.parametrize("chans", [1, 3])
def test_sixteen_bit_grey_keeps_its_high_byte(chans):
    deep = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)
    pixels = np.asarray(open_image(encoded(Image.fromarray(deep), "PNG"), chans))
    assert np.array_equal(pixels if chans == 1 else pixels[..., 2], (deep // 256).astype(np.uint8))


@pytest.mark.parametrize("read", [open_image, predictor.upright], ids=["training", "prediction"])
@pytest.mark.parametrize("chans", [1, 3])
def test_floating_point_pixels_are_refused_and_not_black(read, chans):
    shades = Image.fromarray(np.linspace(0, 1, 120, dtype=np.float32).reshape(10, 12))
    with Image.open(io.BytesIO(encoded(shades, "TIFF"))) as image, pytest.raises(ValueError, match="floating-point"):
        read(image, chans)


def test_cmyk_becomes_rgb():
    inks = np.dstack([COLOUR, GREY // 2])
    source = Image.frombytes("CMYK", (12, 10), inks.tobytes())
    light = (255 - inks[..., :3].astype(np.float64)) * (255 - inks[..., 3:].astype(np.float64)) / 255
    # TIFF stores the inks exactly; PIL computes in whole numbers, which is within 1 of the product.
    assert np.abs(np.asarray(open_image(encoded(source, "TIFF"), 3)) - light).max() <= 1


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(open_image(encoded(Image.fromarray(COLOUR), "PNG", exif=exif), 3))
    assert np.array_equal(pixels, TURNS[orientation](COLOUR))


def test_one_channel_is_luma():
    pixels = np.asarray(open_image(encoded(Image.fromarray(COLOUR), "PNG"), 1))
    assert pixels.shape == (10, 12)
    # PIL rounds the weighted sum to a whole number with 16-bit weights: within 1 of the exact sum.
    assert np.abs(pixels - luma(COLOUR)).max() <= 1


@pytest.mark.parametrize("training", [False, True])
def test_batches_are_bytes_then_floats_between_0_and_1(write, training):
    data = make(write(TWO), in_chans=1, img_size=(8, 6))
    images, targets = next(iter(data.train_dataloader() if training else data.val_dataloader()))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 1, 8, 6))
    assert targets.dtype == torch.int64
    floats, after = data.on_after_batch_transfer((images, targets), 0)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, images.float() / 255)
    assert torch.equal(after, targets)


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_mode": "border", "crop_pct": 1.0},
        {"img_size": (24, 16)},
    ],
)
def test_evaluation_pixels_are_timms_bit_for_bit(write, options, chans):
    root = write({"train/a": 2, "train/b": 2, "val/a": 2, "val/b": 1}, size=(45, 31))
    options = {"img_size": 16} | options
    height, width = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    timm = create_transform(
        (chans, height, width),
        is_training=False,
        interpolation=options.get("interpolation", "bicubic"),
        crop_pct=options.get("crop_pct"),
        crop_mode=options.get("crop_mode"),
        normalize=False,
        **({"mean": (0.449,)} if chans == 1 else {}),
    )
    files = [root / "val" / name for name in ("a/00.png", "a/01.png", "b/00.png")]
    expected = torch.stack([timm(Image.open(file).convert("L" if chans == 1 else "RGB")) for file in files])
    ((images, targets),) = make(root, in_chans=chans, **options).val_dataloader()
    assert torch.equal(images, expected)
    assert targets.tolist() == [0, 0, 1]


def test_evaluation_is_resizing_then_the_centre_by_pillow(write):
    root = write({"train/a": 2, "train/b": 2, "val/a": 1}, size=(40, 30))
    with pytest.warns(UserWarning, match="no images of 1"):
        ((images, _),) = make(root, img_size=24, crop_pct=0.8).val_dataloader()
    # 24 / 0.8 = 30 is the short side already: the picture stays 40 x 30, and the centre begins at (8, 3).
    pixels = np.asarray(Image.open(root / "val" / "a" / "00.png"))[3:27, 8:32]
    assert np.array_equal(images[0].numpy(), pixels.transpose(2, 0, 1))
