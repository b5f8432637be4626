"""Masks as files of every kind become numbers of classes, and lists of classes mean what they say."""

import numpy as np
import pytest
from PIL import Image

from zoo.data.segmentation_classes import make_classes, read_classes
from zoo.data.segmentation_images import fit_labels
from zoo.errors import UsageError

TRUTH = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
COLOURS = {0: (0, 0, 0), 1: (128, 64, 0), 2: (128, 64, 1), 255: (255, 255, 255)}
PAINTED = np.array([[COLOURS[value] for value in row] for row in TRUTH.tolist()], np.uint8)
NUMBERS = make_classes(["sky", "road", "car"], "test", 255)
COLOURED = make_classes(["sky = 0 0 0", "road = 128, 64, 0", "car=128 64 1", "ignore = 255 255 255"], "test", 255)


def palette(values):
    picture = Image.fromarray(values)
    picture.putpalette([part for number in range(256) for part in COLOURS.get(number, (7, 7, number))])
    return picture


def read(tmp_path, picture, classes, ending="png"):
    path = str(tmp_path / f"mask.{ending}")
    picture.save(path)
    return read_classes(path, "image.jpg", (2, 3), classes)


@pytest.mark.parametrize(
    ("make", "ending"),
    [
        (lambda: Image.fromarray(TRUTH), "png"),
        (lambda: palette(TRUTH), "png"),
        (lambda: Image.fromarray(TRUTH.astype(np.uint16)), "png"),
        (lambda: Image.fromarray(TRUTH.astype(np.int32)), "tif"),
        (lambda: Image.fromarray(TRUTH.astype(np.float32)), "tif"),
        (lambda: Image.fromarray(np.repeat(TRUTH[..., None], 3, axis=2)), "png"),
        (lambda: Image.fromarray(np.repeat(TRUTH[..., None], 4, axis=2)), "png"),
    ],
    ids=["grey", "palette", "16 bits", "32 bits", "float", "grey as RGB", "with transparency"],
)
def test_numbers_in_any_picture(tmp_path, make, ending):
    labels = read(tmp_path, make(), NUMBERS, ending)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, TRUTH)


@pytest.mark.parametrize(
    ("picture", "ending"), [(Image.fromarray(PAINTED), "png"), (palette(TRUTH), "png"), (palette(TRUTH), "gif")]
)
def test_colours(tmp_path, picture, ending):
    assert np.array_equal(read(tmp_path, picture, COLOURED, ending), TRUTH)
    assert COLOURED.palette == [COLOURS[n] for n in range(3)]


def test_two_values(tmp_path):
    binary = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    classes = make_classes(["cell", "membrane = 255"], "test", 255)
    assert np.array_equal(read(tmp_path, Image.fromarray(binary), classes), binary // 255)
    one_bit = make_classes(["cell", "membrane"], "test", 255)
    assert np.array_equal(read(tmp_path, Image.fromarray(binary > 0), one_bit), binary // 255)


def test_values_of_their_own_and_a_first_value(tmp_path):
    picture = Image.fromarray(np.array([[7, 1000, 7], [0, 9, 40000]], np.uint16))
    classes = make_classes(["a = 1000", "b = 7", "ignore = 0", "ignore = 9", "c = 40000"], "test", 255)
    assert read(tmp_path, picture, classes).tolist() == [[1, 0, 1], [255, 255, 2]]
    # ADE20K's way: 0 is no class, 1 the first one.
    ade = make_classes(["wall", "building", "sky"], "test", 255, first_value=1)
    assert read(tmp_path, Image.fromarray(TRUTH[:, ::-1].copy()), ade).tolist() == [[1, 0, 255], [255, 255, 1]]


def test_more_classes_than_a_byte_holds(tmp_path):
    classes = make_classes([f"c{n}" for n in range(300)], "test", 65535)
    labels = read(tmp_path, Image.fromarray(np.array([[0, 299, 255], [65535, 256, 1]], np.uint16)), classes)
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[0, 299, 255], [classes.void, 256, 1]]


def test_no_value_is_ignored_when_ignore_index_is_none_of_a_file(tmp_path):
    classes = make_classes(["sky", "road", "car"], "test", -100)
    with pytest.raises(UsageError, match="holds 255 in 1 pixels, which stand for no class"):
        read(tmp_path, Image.fromarray(TRUTH), classes)


@pytest.mark.parametrize(
    ("picture", "classes", "message"),
    [
        (
            Image.fromarray(np.array([[0, 1, 2], [11, 11, 12]], np.uint8)),
            NUMBERS,
            r"mask\.png' holds 11 in 2 pixels, 12 in 1 pixels, which stand for no class. Known: 0 sky, 1 road, 2 car, "
            "255 no class. Mend",
        ),
        (Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) + 9), NUMBERS, "12 in 1 pixels and 2 more, which"),
        (Image.fromarray(PAINTED // 2), COLOURED, r"holds 64 32 0 in 3 pixels, 127 127 127 in 1 pixels, .*0 0 0 sky"),
        (Image.fromarray(PAINTED), NUMBERS, "is coloured, and nothing says which class a colour is"),
        (Image.fromarray(TRUTH.T.copy()), NUMBERS, r"has 3 x 2 pixels \(height x width\), but .*image.jpg' has 2 x 3"),
    ],
    ids=["values", "many values", "colours", "coloured", "size"],
)  # fmt: skip
def test_masks_that_contradict(tmp_path, picture, classes, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, picture, classes)


def test_fractions_and_blurred_masks(tmp_path):
    with pytest.raises(UsageError, match="holds fractions"):
        read(tmp_path, Image.fromarray(TRUTH.astype(np.float32) / 2), NUMBERS, "tif")
    sharp = np.zeros((2, 3), np.uint8)
    sharp[:, 1] = 200
    with pytest.raises(UsageError, match="JPEG blurs the edges of masks: save them as PNG"):
        read(tmp_path, Image.fromarray(sharp), make_classes(["a", "b = 200"], "test", 255), "jpg")


def test_damaged_files_raise_what_pillow_raises(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(TRUTH).save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises((OSError, SyntaxError)):
        read_classes(str(path), "image.jpg", (2, 3), NUMBERS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sky", "road", "sky"], "line 3 of test: the class 'sky' is there twice"),
        (["sky", "road = 0"], "line 2 of test: 0 already stands for another class"),
        (["sky = 1 2 3", "road = 1 2 3"], "1 2 3 already stands for another class"),
        (["sky", "road = 1 2"], "after '=' comes one number, or red, green and blue"),
        (["sky", "road = grey"], "after '=' comes"),
        (["sky", "= 3"], "it should be 'NAME', 'NAME = VALUE' or"),
        (["sky = 1 2 300"], "red, green and blue go from 0 to 255"),
        (["sky", "road = 1 2 3"], "some classes have a colour and others not"),
        (["sky", "ignore"], "say which pixels are ignored"),
        (["", " "], "test names no class"),
        (["ignore = 0"], "test names no class"),
    ],
)
def test_lists_that_cannot_be_read(lines, message):
    with pytest.raises(UsageError, match=message):
        make_classes(lines, "test", 255)


def test_names_may_hold_spaces_and_empty_lines_do_not_count():
    classes = make_classes(["traffic light", "", "lane 2 "], "test", 255)
    assert classes.names == ["traffic light", "lane 2"]
    assert classes.codes.tolist() == [0, 1, 255]


def lab(colour):
    """CIE L*a*b* of sRGB under D65."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(colour) / 255]
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ np.array(linear)
    x, y, z = (v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_of_numbers_are_told_apart():
    palette = make_classes([f"c{n}" for n in range(300)], "test", 1000).palette
    assert len(set(palette[:256])) == 256
    assert make_classes(["a", "b"], "test", 255).palette == palette[:2]
    # 2.3 is a just noticeable difference; of Pascal VOC's first 20 colours the nearest two are 9 apart.
    several = [lab(colour) for colour in palette[:20]]
    assert min(np.linalg.norm(a - b) for n, a in enumerate(several) for b in several[:n]) > 25


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (9, 4), (8, 12)])
def test_resized_labels_are_those_at_the_middle(size):
    labels = np.arange(4 * 6).reshape(4, 6)
    expected = [
        [labels[int((y + 0.5) * 4 / size[0]), int((x + 0.5) * 6 / size[1])] for x in range(size[1])]
        for y in range(size[0])
    ]
    assert fit_labels(labels, size).tolist() == expected
