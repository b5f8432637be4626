"""What a run of segmentation leaves: the right images, pictures with the right colours, one page with all of it."""

import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from zoo.tasks.callbacks.segmentation_gallery import Example, Gallery, image_miou
from zoo.tasks.callbacks.segmentation_pictures import (
    NO_CLASS,
    WRONG,
    classes_shown,
    coloured,
    draw_example,
    errors,
)
from zoo.tasks.callbacks.segmentation_report import class_table

VOID = 200


def labels(seed, size=(20, 30), count=4, classes=3):
    """Truth with pixels without a class, and a prediction that agrees in about half of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (count, *size), generator=generator)
    other = torch.randint(0, classes, (count, *size), generator=generator)
    predicted = truth.where(torch.rand(count, *size, generator=generator) < 0.5, other)
    truth[:, :3] = VOID
    return truth, predicted


def miou_by_hand(predicted, truth, classes):
    values = []
    for number in range(classes):
        inside = [(p == number, t == number) for p, t in zip(predicted.flat, truth.flat, strict=True) if t != VOID]
        union = sum(a or b for a, b in inside)
        if union:
            values.append(sum(a and b for a, b in inside) / union)
    return sum(values) / len(values) if values else math.nan


def test_images_are_judged_as_a_loop_over_pixels_does():
    truth, predicted = labels(0, classes=5)
    truth[0][truth[0] == 4] = 0  # a class that is only predicted
    truth[1][truth[1] == 3], predicted[1][predicted[1] == 3] = 0, 0  # one that nobody shows
    truth[2] = VOID
    found = image_miou(predicted, truth, 5, VOID)
    wanted = [miou_by_hand(p.numpy(), t.numpy(), 5) for p, t in zip(predicted, truth, strict=True)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    assert math.isnan(wanted[2])


def offered(gallery, images=12, batch=3, size=(20, 30)):
    scores = {}
    for start in range(0, images, batch):
        truth, predicted = labels(start, size, batch)
        pictures = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        paths = [f"{start + i:03d}.png" for i in range(batch)]
        scores |= dict(zip(paths, image_miou(predicted, truth, 3, VOID).tolist(), strict=True))
        gallery.offer(paths, pictures, truth, predicted)
    return scores


def test_the_worst_and_the_best_are_kept_and_no_more():
    gallery = Gallery(3, VOID, limit=2)
    scores = offered(gallery)
    ordered = sorted(scores, key=scores.__getitem__)
    chosen = gallery.chosen()
    assert [e.path for e in chosen["worst"]] == ordered[:2]
    assert [e.path for e in chosen["best"]] == ordered[:-3:-1]
    assert len(gallery) == 4
    few = Gallery(3, VOID, limit=5)
    offered(few, images=3)
    assert [len(group) for group in few.chosen().values()] == [3]  # none twice


def test_what_two_processes_kept_becomes_what_one_would_have():
    whole, one, other = (Gallery(3, VOID, limit=2) for _ in range(3))
    for start in range(0, 12, 3):
        truth, predicted = labels(start, count=3)
        pictures = torch.zeros(3, 1, 20, 30, dtype=torch.uint8)
        paths = [f"{start + i:03d}.png" for i in range(3)]
        for gallery in (whole, one if start < 6 else other):
            gallery.offer(paths, pictures, truth, predicted)
    one.merge([one.state(), other.state()])
    assert [[e.path for e in g] for g in one.chosen().values()] == [
        [e.path for e in g] for g in whole.chosen().values()
    ]


def test_large_images_are_kept_small_and_labels_stay_labels():
    gallery = Gallery(3, VOID, limit=1, side=48)
    truth = torch.zeros(1, 96, 192, dtype=torch.int64)
    truth[:, :, 96:] = 2
    image = torch.zeros(1, 1, 96, 192)
    image[..., 96:] = 1.0
    gallery.offer(["a"], image, truth, truth)
    kept = gallery.chosen()["worst"][0]
    assert kept.image.shape == kept.truth.shape == (24, 48)
    assert np.array_equal(kept.truth, np.repeat([[0] * 24 + [2] * 24], 24, axis=0))
    assert kept.image[12, 10] == 0
    assert kept.image[12, 40] == 255


PALETTE = [[10, 20, 30], [200, 0, 0], [0, 200, 0]]


def example():
    truth = np.array([[0, 1, 2], [VOID, 1, 2]])
    predicted = np.array([[0, 2, 2], [1, 1, 0]])
    return Example("a/b.png", 0.5, np.full((2, 3, 3), 255, np.uint8), truth, predicted)


def test_colours_say_classes_and_errors():
    shown = coloured(example().truth, PALETTE, VOID)
    assert [tuple(v) for v in shown.reshape(-1, 3).tolist()] == [
        *((10, 20, 30), (200, 0, 0), (0, 200, 0)),
        *(NO_CLASS[1], (200, 0, 0), (0, 200, 0)),
    ]
    wrong = errors(example(), VOID)
    assert [tuple(v) for v in wrong.reshape(-1, 3).tolist()] == [
        *((255, 255, 255), WRONG, (255, 255, 255)),
        *(NO_CLASS[1], (255, 255, 255), WRONG),
    ]
    assert classes_shown(example(), 4) == [0, 1, 2]


@pytest.mark.parametrize("size", [(40, 30), (30, 60), (20, 90)])
def test_a_picture_has_all_colours_in_its_panels_and_its_legend(size, tmp_path):
    truth = np.zeros(size, np.int64)
    truth[: size[0] // 2] = 1
    predicted = np.full(size, 2)
    predicted[:, : size[1] // 2] = 1
    drawn = Example("x" * 100, 0.25, np.full(size, 128, np.uint8), truth, predicted)
    draw_example(drawn, tmp_path / "deep" / "x.png", ["zero", "one", "two"], PALETTE, VOID)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "x.png").convert("RGB")).reshape(-1, 3)
    for colour in (*PALETTE, WRONG):
        # Hundreds: a panel or a field of the legend, not a stray pixel of an edge.
        assert (pixels == colour).all(1).sum() > 200, colour


def test_pixels_without_a_class_look_like_no_class():
    # A grey that stood for them is also Pascal VOC's seventh colour, and any colour may be in a palette.
    grey = [[128, 128, 128]] * 2
    nothing = np.full((80, 80), VOID)
    for shown in (coloured(nothing, grey, VOID), errors(Example("", 0.0, nothing, nothing, nothing), VOID)):
        colours, counts = np.unique(shown.reshape(-1, 3), axis=0, return_counts=True)
        assert {tuple(colour) for colour in colours.tolist()} == set(NO_CLASS)
        assert counts.tolist() == [3200, 3200]


@pytest.mark.parametrize("size", [(120, 40), (40, 160), (60, 60)])
def test_a_legend_lies_within_the_picture(size, tmp_path, monkeypatch):
    names = [f"_a class of a long name {number} $x^$" for number in range(30)]
    truth = np.arange(size[0] * size[1]).reshape(size) % 30
    truth[0] = VOID
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    drawn = Example("$x^$", 0.5, np.zeros(size, np.uint8), truth, truth)
    draw_example(drawn, tmp_path / "x.png", names, PALETTE * 10, VOID)
    (figure,) = figures
    (legend,) = figure.legends
    inside, box = figure.bbox, legend.get_window_extent()
    assert inside.x0 <= box.x0 < box.x1 <= inside.x1
    assert inside.y0 <= box.y0 < box.y1 <= inside.y1
    # None is left out: the largest classes, no class, wrong.
    assert len(legend.get_texts()) == 26


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.cells, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_data(self, data):
        self.cells.append(data.strip())


def test_test_and_validate_leave_pages_that_need_nothing_else(segmentation, tmp_path, capsys):
    task = segmentation.task(class_names=["ground", "<b>square</b>", "stripe"], metrics=["hd95"])
    runner = segmentation.trainer(tmp_path, task.reports())
    runner.test(task, datamodule=segmentation.Data(), verbose=False)
    assert "<b>square</b>" in capsys.readouterr().out
    runner.validate(task, datamodule=segmentation.Data(), verbose=False)
    for name, stage, count in (("report.html", "test", 7), ("validation.html", "val", 6)):
        text = (tmp_path / name).read_text()
        reader = Reader()
        reader.feed(text)
        assert f"{count} " in text
        assert all(link.startswith("data:image/jpeg;base64,") for link in reader.links)
        # Seven images: the worst six and, of the best six, the one that is not among them.
        assert len(reader.images) == len(list((tmp_path / "pictures").glob(f"{stage}_*.png"))) == count
        assert {"ground", "<b>square</b>", "stripe", "IoU", "HD95 (pixels)"} <= set(reader.cells)
        value = float(runner.callback_metrics["val/miou"]) if stage == "val" else None
        assert value is None or f"{value:.4f}" in reader.cells
    stale = tmp_path / "pictures" / "val_best_9.png"
    stale.write_bytes(io.BytesIO().getvalue())
    runner.validate(task, datamodule=segmentation.Data(), verbose=False)
    assert not stale.exists()


def test_what_has_no_value_is_a_dash():
    columns, rows = class_table({"sky": {"iou": 0.5, "hd95": 3.0}, "boat": {"iou": 0.25}})
    assert columns == ["class", "IoU", "HD95 (pixels)"]
    assert rows == [["sky", "0.5000", "3.00"], ["boat", "0.2500", "-"]]
