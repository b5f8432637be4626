"""What a test of a detector leaves: counts as brute force has them, the right pictures, one page with all of it."""

import base64
import csv
import gc
import io
import math
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from zoo.tasks.callbacks.anomaly_gallery import GROUPS, Example, Gallery
from zoo.tasks.callbacks.anomaly_pictures import FOUND, draw_example, draw_scores, heat_range, short_path, verdict
from zoo.tasks.callbacks.anomaly_report import AnomalyReport
from zoo.tasks.callbacks.anomaly_rows import DefectRow, ImageRow, auroc, by_kind, by_size, measure

SIZE = (40, 56)


def sample(index, size=SIZE):
    """Outputs of one image: numbers 0 to 5 are good, the others have one to three defects of two kinds."""
    generator = np.random.default_rng(index)
    mask = np.zeros(size, bool)
    for _ in range(generator.integers(1, 4) if index > 5 else 0):
        top, left = generator.integers(0, size[0] - 9), generator.integers(0, size[1] - 9)
        mask[top : top + generator.integers(1, 9), left : left + generator.integers(1, 9)] = True
    heat = generator.random(size).astype(np.float32) + 0.4 * mask
    kind = "good" if index <= 5 else ("scratch", "<b>dent</b>")[index % 2]
    return {
        "score": torch.tensor(float(heat.max())),
        "map": torch.from_numpy(heat)[None],
        "image": torch.from_numpy(generator.integers(0, 256, (3, *size), dtype=np.uint8)),
        "mask": torch.from_numpy(mask)[None],
        "label": torch.tensor(int(index > 5)),
        "has_mask": torch.tensor(True),
        "kind": kind,
        "path": f"test/{kind.strip('<>/b')}/{index:03d}.png",
    }


class Judge(LightningModule):
    """Answers with what the data holds, as a detector's test_step does."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"method": "memory_bank", "backbone": "resnet18", "img_size": list(SIZE)})
        self.register_buffer("threshold", torch.tensor(1.1))
        self.register_buffer("pixel_threshold", torch.tensor(0.9))

    def test_step(self, batch, batch_idx):
        self.log("test/image_auroc", 0.75, batch_size=len(batch["score"]))
        return batch


def run_test(folder, count=20, batch=3, **arguments):
    loader = DataLoader([sample(i) for i in range(count)], batch_size=batch)
    report, task = AnomalyReport(str(folder), **arguments), Judge()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(callbacks=[report], default_root_dir=folder, **quiet).test(task, loader, verbose=False)
    return report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run_test(folder, pictures=2)
    return folder


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def regions(mask):
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return [labels == i for i in range(1, count + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_an_image(seed):
    generator = np.random.default_rng(seed)
    mask, above = generator.random((2, 12, 17)) < 0.25
    image, defects = measure("a.png", "dent", True, 0.5, above, mask)
    assert image.defect_share == mask.mean()
    assert image.covered == pytest.approx(above[mask].mean())
    assert image.spilled == pytest.approx(above[~mask].mean())
    wanted = sorted((int(r.sum()), float(above[r].mean())) for r in regions(mask))
    np.testing.assert_allclose(sorted((d.pixels, d.covered) for d in defects), wanted, rtol=1e-12)


def test_images_without_defect_without_good_pixel_and_without_mask():
    above = np.ones((3, 3), bool)
    assert measure("a", "good", False, 1.0, above, ~above) == (ImageRow("a", "good", False, 1.0, 0.0, None, 1.0), [])
    image, defects = measure("a", "dent", True, 1.0, above, above)
    assert (image.defect_share, image.covered, image.spilled) == (1.0, 1.0, None)
    assert defects == [DefectRow("a", "dent", 9, 1.0)]
    assert measure("a", "dent", True, 1.0, above, None) == (ImageRow("a", "dent", True, 1.0, None, None, None), [])


def test_auroc_is_that_of_sklearn_also_with_ties():
    generator = np.random.default_rng(0)
    good, bad = generator.integers(0, 6, 40).tolist(), generator.integers(2, 8, 25).tolist()
    assert auroc(good, bad) == pytest.approx(roc_auc_score([0] * 40 + [1] * 25, good + bad), abs=1e-12)
    assert math.isnan(auroc([], bad))
    assert math.isnan(auroc(good, []))


def test_the_csv_files_hold_what_a_loop_counts(written):
    samples = [sample(i) for i in range(20)]
    good = [float(s["score"]) for s in samples if not s["label"]]
    found = [(s["kind"], int(r.sum()), (s["map"][0].numpy() > 0.9)[r]) for s in samples for r in regions(s["mask"][0])]
    images = rows_of(written / "test_images.csv")
    assert [r["path"] for r in images] == [s["path"] for s in sorted(samples, key=lambda s: -float(s["score"]))]
    for row in images:
        mine = next(s for s in samples if s["path"] == row["path"])
        assert np.float32(row["score"]) == np.float32(mine["score"])
        above = float(mine["score"]) > 1.1
        assert row["verdict"] == {(1, True): "found", (1, False): "missed", (0, True): "false alarm"}.get(
            (int(mine["label"]), above), "passed"
        )
    kinds = {r["kind"]: r for r in rows_of(written / "test_kinds.csv")}
    assert list(kinds) == ["<b>dent</b>", "scratch", "all defects", "good"]
    for kind in ("scratch", "<b>dent</b>", "all defects"):
        scores = [float(s["score"]) for s in samples if s["label"] and kind in (s["kind"], "all defects")]
        hits = [(above.any(), above.mean()) for k, _, above in found if kind in (k, "all defects")]
        row = kinds[kind]
        assert int(row["images"]) == len(scores)
        assert int(row["above"]) == sum(s > 1.1 for s in scores)
        oracle = roc_auc_score([0] * len(good) + [1] * len(scores), good + scores)
        assert float(row["auroc"]) == pytest.approx(oracle, abs=1e-8)
        assert (int(row["defects"]), int(row["hit"])) == (len(hits), sum(h for h, _ in hits))
        assert float(row["covered"]) == pytest.approx(np.mean([c for _, c in hits]), abs=1e-8)
    assert (int(kinds["good"]["images"]), int(kinds["good"]["above"])) == (6, sum(s > 1.1 for s in good))
    assert kinds["good"]["auroc"] == ""
    sizes = [r for r in rows_of(written / "test_sizes.csv") if r["kind"] == "all"]
    edges = np.quantile([n for _, n, _ in found], (0.25, 0.5, 0.75))
    for row, low, high in zip(sizes, [0, *edges], [*edges, math.inf], strict=True):
        part = [above for _, n, above in found if low < n <= high]
        assert (int(row["defects"]), int(row["hit"])) == (len(part), sum(a.any() for a in part))
        assert float(row["covered"]) == pytest.approx(np.mean([a.mean() for a in part]), abs=1e-8)


def test_every_defect_counts_once_whatever_sizes_are_equal():
    for sizes in ([4] * 7, [1, 1, 1, 9], [1, 2, 3, 4, 5, 6], [3]):
        lines = by_size([DefectRow(str(i), "dent", n, 0.0) for i, n in enumerate(sizes)])
        assert sum(line.defects for line in lines) == len(sizes)
        assert [line.low for line in lines] == sorted(line.low for line in lines)
    assert by_size([]) == []
    assert by_kind([ImageRow("a", "dent", True, 1.0, None, None, None)], [], math.nan)[0].above == 0


def fill(gallery, order, size=SIZE):
    held = []
    for i in order:
        s = sample(i, size)
        gallery.offer(s["path"], s["kind"], bool(s["label"]), float(s["score"]), s["image"], s["map"][0], s["mask"][0])
        held += [weakref.ref(s[k]) for k in ("image", "map", "mask")]
    return held


def names(chosen):
    return {group: [e.path for e in examples] for group, examples in chosen.items()}


def test_shows_the_worst_and_the_best_in_any_order():
    gallery = Gallery(limit=2, side=64)
    fill(gallery, range(40))
    scored = sorted((float(sample(i)["score"]), sample(i)["path"], sample(i)["kind"]) for i in range(40))
    good = [p for _, p, k in scored if k == "good"]
    by = {kind: [(v, p) for v, p, k in scored if k == kind] for kind in ("scratch", "<b>dent</b>")}
    # The two kinds take turns.
    worst = [p for _, p in sorted(v[0] for v in by.values())]
    best = [p for _, p in sorted((v[-1] for v in by.values()), reverse=True)]
    wanted = {"worst_defect": worst, "worst_good": good[:-3:-1], "best_defect": best, "best_good": good[:2]}
    assert names(gallery.chosen()) == wanted
    assert list(gallery.chosen()) == list(GROUPS)
    backwards = Gallery(limit=2, side=64)
    fill(backwards, reversed(range(40)))
    assert names(backwards.chosen()) == wanted


def test_few_images_are_shown_once():
    gallery = Gallery(limit=6, side=64)
    fill(gallery, range(4, 8))
    paths = [p for group in names(gallery.chosen()).values() for p in group]
    assert sorted(paths) == sorted(sample(i)["path"] for i in range(4, 8))


def test_big_maps_do_not_pile_up():
    gallery = Gallery(limit=2, side=32)
    held = fill(gallery, range(60), size=(200, 150))
    gc.collect()
    assert not any(ref() is not None for ref in held)
    # Two groups of good images, two of each of two kinds of defects.
    assert len(gallery) == 2 * (2 + 4)
    for example in (e for group in gallery.chosen().values() for e in group):
        for array in (example.image, example.map, example.mask):
            assert array.shape[:2] == (32, 24)
            base = array
            while isinstance(base, np.ndarray) and base.base is not None:
                base = base.base
            assert base.nbytes <= 32 * 24 * 4


def test_a_small_copy_keeps_the_smallest_defect():
    heat, mask = torch.zeros(300, 300), torch.zeros(300, 300, dtype=torch.bool)
    heat[201, 17], mask[123, 45] = 5.0, True
    gallery = Gallery(side=50)
    gallery.offer("a", "dent", True, 5.0, torch.zeros(1, 300, 300), heat, mask)
    (example,) = gallery.chosen()["worst_defect"]
    assert example.image.shape == example.map.shape == (50, 50)
    assert example.map[201 // 6, 17 // 6] == 5.0
    assert example.mask[123 // 6, 45 // 6]
    assert example.mask.sum() == 1


def test_what_processes_kept_adds_up():
    whole, one, other = (Gallery(limit=3, side=64) for _ in range(3))
    fill(whole, range(30))
    fill(one, range(0, 30, 2))
    fill(other, [*range(1, 30, 2), 0])
    one.merge([one.state(), other.state()])
    assert names(one.chosen()) == names(whole.chosen())
    assert len(one) == len(whole)


class Reader(HTMLParser):
    """All tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_its_pictures_and_asks_for_nothing(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    pictures = sorted(p.name for p in (written / "pictures").glob("test_*.png"))
    assert len(images) == len(pictures)
    for attributes in images:
        start, _, data = attributes["src"].partition(",")
        assert start == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert min(picture.size) > 150
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a"}
    assert "url(" not in text
    assert "@import" not in text
    # Names are text, never markup: the only <b> are those of the figures on top.
    assert "<b>dent</b>" in page.text
    assert [t for t, _ in page.tags].count("b") == 2
    for part in ("image AUROC", "0.7500", "threshold of the score", "1.1", "By kind", "By size", "6 good and 14 defec"):
        assert any(part in piece for piece in page.text), part


def test_a_bounded_number_of_pictures_and_none_of_an_earlier_test(tmp_path):
    mine = tmp_path / "pictures" / "test_mine.png"
    run_test(tmp_path, pictures=2)
    assert len(list((tmp_path / "pictures").glob("test_*_*.png"))) == 8
    mine.write_bytes(b"")
    run_test(tmp_path, count=7, pictures=1)
    left = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    drawn = ["best_good_1", "mine", "scores", "worst_defect_1", "worst_good_1"]
    assert left == [f"test_{name}.png" for name in drawn]


def test_the_tables_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run_test(tmp_path, pictures=1)
    out = capsys.readouterr().out
    kinds = {r["kind"]: r for r in rows_of(tmp_path / "test_kinds.csv")}
    line = next(line for line in out.splitlines() if line.startswith("scratch"))
    assert f"{kinds['scratch']['above']} of {kinds['scratch']['images']} (" in line
    assert f"{float(kinds['scratch']['auroc']):.3f}" in line
    assert "…" not in out
    assert "Q4" in out


def picture(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def near(pixels, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(-1) < 40).sum())


def example(size=(60, 50), mask=True, grey=False, high=True):
    heat = np.zeros(size, np.float32)
    heat[10:30, 10:30] = 1.0 if high else 0.1
    image = np.full(size if grey else (*size, 3), 90, np.uint8)
    return Example("a/b.png", "dent", True, 1.0, image, heat, heat > 0.05 if mask else None)


def test_the_contour_is_drawn_where_the_map_is_above(tmp_path):
    drawn, bare = tmp_path / "a.png", tmp_path / "b.png"
    draw_example(example(), drawn, 0.5, 0.5, (0.0, 1.0))
    draw_example(example(high=False), bare, 0.5, 0.5, (0.0, 1.0))
    # Besides the outline of 20 x 20 of 50 x 60 pixels, only a few letters and the mark of the colour bar are red.
    assert near(picture(drawn), FOUND) > near(picture(bare), FOUND) + 200


@pytest.mark.parametrize("size", [(30, 30), (200, 50), (100, 170), (40, 160), (1, 1), (2, 90)])
@pytest.mark.parametrize("mask", [True, False])
def test_pictures_of_any_shape(size, mask, tmp_path):
    heat = np.zeros(size, np.float32)
    one = Example("p" * 90, "dent", True, math.nan, np.zeros(size, np.uint8), heat, heat > 1 if mask else None)
    draw_example(one, tmp_path / "a.png", math.nan, math.nan, heat_range([one], math.nan))
    pixels = picture(tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 150
    assert max(pixels.shape[:2]) < 3000


@pytest.mark.parametrize("kinds", [[], ["dent"], [f"a kind with a long name {i}" for i in range(9)]])
@pytest.mark.parametrize("threshold", [0.5, math.nan])
def test_scores_of_none_one_and_many_kinds(kinds, threshold, tmp_path):
    rows = [ImageRow(f"g{i}", "good", False, i / 40, 0.0, None, 0.0) for i in range(20)]
    rows += [ImageRow(f"{k}{i}", k, True, 0.3 + i / 9, None, None, None) for k in kinds for i in range(6)]
    draw_scores(rows, threshold, tmp_path / "a.png")
    assert min(picture(tmp_path / "a.png").shape[:2]) > 250
    draw_scores(rows[:1], threshold, tmp_path / "a.png")


def test_colours_reach_from_good_to_defects():
    def flat(value, defective):
        heat = np.full((4, 4), value, np.float32)
        return Example(str(value), "x", defective, value, heat.astype(np.uint8), heat, None)

    assert heat_range([flat(1.0, False), flat(9.0, True)], 3.0) == (1.0, 9.0)
    # A threshold above every defect still lies within the colours.
    assert heat_range([flat(1.0, False), flat(2.0, True)], 5.0) == (1.0, 7.0)
    low, high = heat_range([flat(2.0, True)], math.nan)
    assert low == 2.0 < high


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("a/b.png", "a/b.png"),
        ("/data/" + "x" * 50 + "/good/000.png", "…/good/000.png"),
        ("/data/" + "x" * 30 + "/" + "y" * 19 + "/000.png", "…/" + "x" * 30 + "/" + "y" * 19 + "/000.png"),
        ("a/" + "0123456789" * 8, "…" + "123456789" + "0123456789" * 5),
    ],
)
def test_long_paths_are_cut_between_folders(path, short):
    assert short_path(path) == short
    assert len(short) <= 60


def test_verdicts():
    assert [verdict(d, s, 1.0) for d in (True, False) for s in (1.0, 1.5)] == [
        "missed",
        "found",
        "passed",
        "false alarm",
    ]
    assert verdict(True, 1.0, math.nan) == "defect"


def test_without_masks_and_without_a_threshold(tmp_path):
    samples = [sample(i) | {"has_mask": torch.tensor(i <= 5)} for i in range(9)]
    task = Judge()
    task.threshold.fill_(math.nan)
    task.pixel_threshold.fill_(math.nan)
    report = AnomalyReport(pictures=1)
    trainer = Trainer(
        callbacks=[report], default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.test(task, DataLoader(samples, batch_size=4), verbose=False)
    assert not rows_of(tmp_path / "test_sizes.csv")
    bad = [r for r in rows_of(tmp_path / "test_images.csv") if r["defective"] == "True"]
    assert len(bad) == 3
    assert all(r["covered"] == r["defect_share"] == "" for r in bad)
    assert "threshold of the score" not in Path(tmp_path / "report.html").read_text(encoding="utf-8")
