"""The predictor's pixels: timm's evaluation transform to the bit, and files of every kind as training reads them."""

import json

import numpy as np
import pytest
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform

from zoo.export.predictor import Predictor

# (width, height): one pixel, odd, square, the target itself, smaller than it, tall, wide.
SIZES = [(1, 1), (33, 57), (57, 33), (256, 256), (32, 32), (20, 23), (31, 200), (211, 17), (1, 60), (480, 359)]


def predictor(img_size=(32, 32), in_chans=3, **values):
    """A predictor of pixels without a model behind it."""
    mean = IMAGENET_DEFAULT_MEAN if in_chans == 3 else [sum(IMAGENET_DEFAULT_MEAN) / 3]
    entries = {"format": "1", "task": "classification", "class_names": '["a"]', "in_chans": str(in_chans)}
    entries |= {"crop_pct": "0.875", "crop_mode": "center", "interpolation": "bilinear"}
    entries |= {"img_size": json.dumps(img_size), "border_fill": json.dumps([round(255 * v) for v in mean])}
    entries |= {name: str(value) for name, value in values.items()}

    class WithoutModel(Predictor):
        def _open(self, path, providers):
            return {f"zoo.{name}": value for name, value in entries.items()}, lambda batch: [batch]

    return WithoutModel("none")


def timms(img_size=(32, 32), in_chans=3, crop_pct=None, **values):
    grey = {"mean": (sum(IMAGENET_DEFAULT_MEAN) / 3,)} if in_chans == 1 else {}
    return create_transform(
        (in_chans, *img_size), is_training=False, normalize=False, crop_pct=crop_pct, **values, **grey
    )


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("img_size", [(32, 32), (37, 37), (24, 41), (64, 33)])
def test_equal_to_timm_to_the_bit(crop_mode, interpolation, img_size):
    compared = 0
    for crop_pct in (0.875, 0.9, 0.95, 1.0, 0.6):
        options = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        ours, theirs = predictor(img_size, **options), timms(img_size, **options)
        for size in SIZES:
            image = picture(*size)
            try:
                expected = theirs(image).numpy()
            except ValueError:  # timm rounds the shorter side of a very long picture to nothing
                assert crop_mode == "border"
                continue
            actual = ours.preprocess(image)
            assert (actual.dtype, actual.shape) == (np.uint8, (3, *img_size))
            assert actual.flags.c_contiguous
            np.testing.assert_array_equal(actual, expected, err_msg=f"{size} {options}")
            compared += 1
    assert compared >= 40


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_grey_models(crop_mode):
    ours, theirs = predictor(in_chans=1, crop_mode=crop_mode), timms(in_chans=1, crop_mode=crop_mode)
    for size in ((33, 57), (20, 23), (211, 17)):
        image = picture(*size, mode="L")
        np.testing.assert_array_equal(ours.preprocess(image), theirs(image).numpy())


def test_very_long_pictures():
    assert predictor(crop_mode="border").preprocess(picture(200, 1)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="100000x1 is too long and thin"):
        predictor(img_size=(512, 512)).preprocess(Image.new("RGB", (100000, 1)))


def files(folder):
    """Name -> (path, what a person sees: RGB uint8 (H, W, 3)); each picture is 40 x 30 and not symmetric."""
    rgb = picture(40, 30)
    grey = np.asarray(rgb.convert("L"))
    made = {}

    def add(name, image, seen, **options):
        image.save(folder / name, **options)
        made[name] = (folder / name, np.asarray(seen.convert("RGB")))

    add("rgb.png", rgb, rgb)
    add("grey.png", Image.fromarray(grey), Image.fromarray(grey))
    bits = Image.fromarray(grey > 127)
    add("one_bit.png", bits, bits)
    palette = rgb.quantize(64)
    add("palette.png", palette, palette)
    add("palette.gif", palette, palette)
    transparent = rgb.convert("RGBA")
    transparent.putalpha(Image.fromarray(grey))
    add("rgba.png", transparent, rgb)
    add(
        "grey_alpha.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]), Image.fromarray(grey)
    )
    deep = grey.astype(np.uint16) * 256 + 77
    for name in ("sixteen.png", "sixteen.tif"):
        add(name, Image.fromarray(deep), Image.fromarray(grey))
    add("thirty_two.tif", Image.fromarray(deep.astype(np.int32)), Image.fromarray(grey))
    for name, image in (("cmyk.jpg", rgb.convert("CMYK")), ("rgb.jpg", rgb), ("lossy.webp", rgb)):
        image.save(folder / name)
        made[name] = (folder / name, np.asarray(Image.open(folder / name).convert("RGB")))
    # A camera held sideways: the file's pixels are turned, and its tag says how to turn them back.
    turned = rgb.transpose(Image.Transpose.ROTATE_90)
    tag = Image.Exif()
    tag[0x0112] = 6
    add("sideways.png", turned, rgb, exif=tag)
    return made


NAMES = ["rgb.png", "grey.png", "one_bit.png", "palette.png", "palette.gif", "rgba.png", "grey_alpha.png"]
NAMES += ["sixteen.png", "sixteen.tif", "thirty_two.tif", "cmyk.jpg", "rgb.jpg", "lossy.webp", "sideways.png"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return files(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_files(pictures, name):
    path, seen = pictures[name]
    # At its own size and crop_pct 1 nothing is resized: what comes out is the picture itself.
    actual = predictor((30, 40), crop_pct=1.0).preprocess(path)
    np.testing.assert_array_equal(actual, np.moveaxis(seen, 2, 0))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_the_data_module(pictures, name, in_chans):
    data = pytest.importorskip("zoo.data", reason="needs the train extra")
    images = pytest.importorskip("zoo.data.images")
    path, _ = pictures[name]
    module = data.ImageClassification(root="", img_size=24, in_chans=in_chans, interpolation="bicubic", crop_pct=0.9)
    expected = module.transform(training=False)(images.open_image(path, in_chans)).numpy()
    ours = predictor((24, 24), in_chans, interpolation="bicubic", crop_pct=0.9)
    np.testing.assert_array_equal(ours.preprocess(path), expected)


def test_arrays_and_images(pictures):
    path, seen = pictures["rgb.png"]
    whole = predictor((30, 40), crop_pct=1.0)
    for image in (seen, Image.open(path), str(path), np.dstack([seen, seen[..., :1]])):
        np.testing.assert_array_equal(whole.preprocess(image), np.moveaxis(seen, 2, 0))
    grey = seen[..., 0]
    for image in (grey, grey[..., None]):
        np.testing.assert_array_equal(whole.preprocess(image), np.stack([grey] * 3))


@pytest.mark.parametrize("error", [SyntaxError, ValueError, OSError])
def test_garbled_exif_does_not_lose_the_picture(pictures, monkeypatch, error):
    def garbled(self):
        raise error("garbled")

    path, seen = pictures["rgb.jpg"]
    monkeypatch.setattr(Image.Image, "getexif", garbled)
    np.testing.assert_array_equal(predictor((30, 40), crop_pct=1.0).preprocess(path), np.moveaxis(seen, 2, 0))
