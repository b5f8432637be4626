"""Windows over large images: as a loop in float64 has them, without seams, in the memory of one row."""

import math

import numpy as np
import pytest
import torch

from zoo.errors import UsageError
from zoo.export import predictor
from zoo.tasks.sliding import check_window, classes_by_windows


def by_place(images):
    """Logits of four classes that depend on a pixel and on where it lies in its window, so that blending shows."""
    rows = torch.linspace(-0.3, 0.3, images.shape[-2])[:, None]
    columns = torch.linspace(-0.2, 0.2, images.shape[-1])
    values = images.float() / 255
    parts = [values[:, 0] + rows, values[:, 1] + columns, values[:, 2] - rows * columns, 0.5 + 0 * values[:, 0]]
    return torch.stack(parts, 1)


def brute_force(image, window, overlap):
    """Every window on its own, in float64: classes (H, W) and how far the best class is ahead."""
    (height, width), (rows, columns) = window, image.shape[1:]
    padded = image[:, np.minimum(np.arange(max(rows, height)), rows - 1)]
    padded = padded[:, :, np.minimum(np.arange(max(columns, width)), columns - 1)]

    def places(length, side):
        if length <= side:
            return [0]
        count = math.ceil((length - overlap) / (side - overlap))
        return [round(i * (length - side) / (count - 1)) for i in range(count)]

    def weight(place, side):
        return min(1.0, (min(place, side - 1 - place) + 0.5) / max(overlap, 1))

    total, weights = np.zeros((4, *padded.shape[1:])), np.zeros(padded.shape[1:])
    ramps = np.array([[weight(y, height) * weight(x, width) for x in range(width)] for y in range(height)])
    for top in places(padded.shape[1], height):
        for left in places(padded.shape[2], width):
            inside = np.s_[..., top : top + height, left : left + width]
            total[inside] += ramps * by_place(torch.from_numpy(padded[inside][None]).double())[0].double().numpy()
            weights[inside] += ramps
    means = (total / weights)[:, :rows, :columns]
    ordered = np.sort(means, 0)
    return means.argmax(0), ordered[-1] - ordered[-2]


@pytest.mark.parametrize(
    ("size", "window", "overlap"),
    [
        ((37, 61), (16, 16), 4),
        ((37, 61), (16, 24), 8),
        ((40, 24), (16, 24), 0),  # one column
        ((9, 50), (16, 16), 5),  # lower than a window
        ((7, 5), (16, 12), 6),  # smaller than a window
        ((16, 16), (16, 16), 8),
    ],
)
def test_as_a_loop_over_windows_has_it(size, window, overlap):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = classes_by_windows(by_place, images, window, overlap, batch_size=3)
    assert found.shape == (2, *size)
    assert found.dtype == torch.int64
    for image, classes in zip(images.numpy(), found.numpy(), strict=True):
        wanted, ahead = brute_force(image, window, overlap)
        # Only where two classes are closer than float32 adds up may the other one win.
        assert (classes == wanted)[ahead > 1e-5].all()
        assert (ahead > 1e-5).mean() > 0.99


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_no_seams_where_windows_agree(batch_size):
    """A network that looks at single pixels gives by windows what it gives at once."""
    images = torch.randint(0, 256, (2, 3, 45, 70), dtype=torch.uint8)
    found = classes_by_windows(lambda x: x.float(), images, (16, 16), 7, batch_size)
    # Of two equal channels the first wins; sums of float32 may tell them apart.
    values = images.sort(1).values
    sure = values[:, -1] != values[:, -2]
    assert torch.equal(found[sure], images.float().argmax(1)[sure])


def test_the_predictor_has_the_same_arithmetic():
    image = torch.randint(0, 256, (3, 53, 80), dtype=torch.uint8)
    metadata = {
        "zoo.img_size": "[16, 24]",
        "zoo.class_names": '["a", "b", "c", "d"]',
        "zoo.palette": "[[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]",
        "zoo.any_size": "false",
        "zoo.window": "[16, 24]",
        "zoo.window_overlap": "6",
        "zoo.eval_size": "null",
    }
    output = predictor.Segmentation(metadata)
    answers = output.answers([image.numpy()], lambda batch: [by_place(torch.from_numpy(batch)).numpy()], 1, 3)
    wanted = classes_by_windows(by_place, image[None], (16, 24), 6)[0].numpy()
    # The order of a sum is the same in both.
    assert (next(answers).classes == wanted).mean() > 0.9999


def test_memory_is_that_of_one_row_of_windows():
    seen = []

    def counting(images):
        seen.append(len(images))
        return by_place(images)

    classes_by_windows(counting, torch.zeros(1, 3, 200, 48, dtype=torch.uint8), (16, 16), 0, batch_size=2)
    assert max(seen) == 2
    assert sum(seen) == 13 * 3


def test_windows_that_cannot_be():
    assert check_window((64, 48), None) == 12
    assert check_window(None, None) is None
    with pytest.raises(UsageError, match="without a window"):
        check_window(None, 3)
    with pytest.raises(UsageError, match="share 0 to 24"):
        check_window((64, 48), 25)
    with pytest.raises(UsageError, match="at least 2"):
        check_window((1, 48), 0)
