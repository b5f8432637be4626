"""Padding is no part of an image: whatever a detector says there, no figure, threshold or report may change."""

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from zoo.data import AnomalyDetection as Data
from zoo.tasks import AnomalyDetection
from zoo.tasks.anomaly_metrics import Measures
from zoo.tasks.callbacks.anomaly_report import AnomalyReport

SIDE = 48
# (height, width) of the images; each keeps its shape in a square of 48, and one fills it.
SHAPES = [(12, 48), (24, 96), (48, 20), (48, 48), (30, 40)]
INNER = [(12, 48), (12, 48), (48, 20), (48, 48), (36, 48)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images of five shapes: good ones, and ones with a defect; the last of these has no mask."""
    folder = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for name in ("train/good", "test/good", "test/cut", "ground_truth/cut"):
        (folder / name).mkdir(parents=True)
    for index, shape in enumerate(SHAPES):
        for name in ("train/good", "test/good", "test/cut"):
            pixels = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
        if index < 4:
            mask = np.zeros(shape, np.uint8)
            mask[2:10, 4:16] = 255
            Image.fromarray(mask).save(folder / "ground_truth/cut" / f"{index}_mask.png")
    return folder


def data(root, **arguments):
    options = {"img_size": SIDE, "num_workers": 0, "batch_size": 3, "resize": "pad", "val_split": 0.4}
    return Data(str(root), **(options | arguments))


def inner_of(path):
    """The part that an image takes, from its number."""
    return INNER[int(path.rsplit("/", 1)[1].removesuffix(".png"))]


def seen(batch, padding):
    """Maps (B, 1, H, W) that stand out a little in the defects, with `padding` around the images."""
    maps = torch.full(batch["mask"].shape, float(padding))
    for one, mask, path in zip(maps, batch["mask"], batch["path"], strict=True):
        height, width = inner_of(path)
        noise = np.random.default_rng(int(batch["image"].sum()) % 1000 + len(path)).random((height, width))
        one[0, :height, :width] = torch.from_numpy(noise) + 0.4 * mask[0, :height, :width]
    return maps


def flat(loader):
    """Values and truth of all pixels that belong to an image with a known mask, by a loop."""
    values, truth = [], []
    for batch in loader:
        for one, mask, path, known in zip(seen(batch, 0), batch["mask"], batch["path"], batch["has_mask"], strict=True):
            if known:
                height, width = inner_of(path)
                values.append(one[0, :height, :width].numpy().ravel())
                truth.append(mask[0, :height, :width].numpy().ravel())
    return np.concatenate(values), np.concatenate(truth)


def measured(loader, padding):
    measures = Measures()
    for batch in loader:
        measures.update(torch.arange(float(len(batch["label"]))), seen(batch, padding), batch)
    return measures.compute(0.5), measures.thresholds(0.01)


def test_a_sample_says_which_part_is_image(root):
    for loader in (data(root).test_dataloader(), data(root).val_dataloader()):
        for batch in loader:
            assert batch["inner_size"].dtype == torch.int64
            assert batch["inner_size"].tolist() == [list(inner_of(path)) for path in batch["path"]]
    for options in ({"resize": "stretch"}, {"tile": 16}):
        assert not any("inner_size" in batch for batch in data(root, **options).test_dataloader())


@pytest.mark.parametrize("stage", ["test", "val"])
def test_figures_and_thresholds_are_those_of_the_images_alone(root, stage):
    loader = getattr(data(root), f"{stage}_dataloader")()
    values, thresholds = measured(loader, 0)
    flat_values, truth = flat(loader)
    # The project's pixel metrics are exact to 1e-4.
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(truth, flat_values), abs=1e-4)
    assert values["pixel_aupr"] == pytest.approx(average_precision_score(truth, flat_values), abs=1e-4)
    precision, recall, at = precision_recall_curve(truth, flat_values)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    assert values["pixel_f1_max"] == pytest.approx(f1.max(), abs=1e-4)
    # So few scores have a bin each; the threshold separates float32 neighbours.
    assert thresholds[1] == pytest.approx(at[f1.argmax()], rel=1e-6)
    assert "aupro_0.3" in values
    for padding in (-5.0, 0.7, 100.0):
        assert measured(loader, padding) == (values, thresholds)


class Judge(LightningModule):
    """Answers as a detector's test_step does, with maps that are `padding` around the images."""

    def __init__(self, padding):
        super().__init__()
        self.padding = padding
        self.save_hyperparameters({"method": "memory_bank", "backbone": "resnet18", "img_size": [SIDE, SIDE]})
        self.register_buffer("threshold", torch.tensor(1.1))
        self.register_buffer("pixel_threshold", torch.tensor(0.9))

    def test_step(self, batch, batch_idx):
        return batch | {"score": torch.ones(len(batch["label"])), "map": seen(batch, self.padding)}


def reported(root, folder, padding):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[AnomalyReport(str(folder), pictures=1)], default_root_dir=folder, **quiet)
    trainer.test(Judge(padding), data(root).test_dataloader(), verbose=False)
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".csv", ".png"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_the_report_counts_and_shows_the_images_alone(root, tmp_path):
    files = reported(root, tmp_path / "a", 0.0)
    with open(tmp_path / "a" / "test_images.csv", newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    sizes, known = [], 0
    for batch in data(root).test_dataloader():
        for one, mask, path, has in zip(seen(batch, 0), batch["mask"], batch["path"], batch["has_mask"], strict=True):
            if not has:
                continue
            known += 1
            height, width = inner_of(path)
            inside, above = mask[0, :height, :width].numpy(), one[0, :height, :width].numpy() > np.float32(0.9)
            assert float(rows[path]["defect_share"]) == pytest.approx(inside.mean(), rel=1e-6)
            assert float(rows[path]["spilled"]) == pytest.approx(above[~inside].mean(), rel=1e-6)
            sizes += [int(s) for s in np.bincount(ndimage.label(inside, np.ones((3, 3)))[0].ravel())[1:]]
    assert known == len(rows) - 1
    with open(tmp_path / "a" / "test_sizes.csv", newline="", encoding="utf-8") as file:
        assert sum(int(row["defects"]) for row in csv.DictReader(file) if row["kind"] == "all") == len(sizes) == 4
    # Padding far above the threshold of pixels changes neither a table nor a picture.
    assert any(name.endswith(".png") for name in files)
    assert reported(root, tmp_path / "b", 50.0) == files


def test_a_detector_measures_and_selects_by_the_images_alone(root, tmp_path):
    """Two tasks that differ in nothing but what they say of the padding end with equal figures and thresholds."""
    ends, tables = [], []
    for padding in (0.0, 50.0):
        torch.manual_seed(0)
        task = AnomalyDetection("memory_bank", "test_efficientnet", [1, 2], img_size=SIDE)
        inspect = task._inspect

        def padded(batch, inspect=inspect, padding=padding):
            output = inspect(batch)
            for one, (height, width) in zip(output.map, batch["inner_size"].tolist(), strict=True):
                one[0, height:], one[0, :, width:] = padding, padding
            return output

        task._inspect = padded
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        folder = tmp_path / str(padding)
        report = AnomalyReport(str(folder), pictures=1)
        trainer = Trainer(
            max_epochs=1, callbacks=[report], default_root_dir=folder, enable_checkpointing=False, **quiet
        )
        trainer.fit(task, datamodule=data(root))
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        trainer.test(task, datamodule=data(root), verbose=False)
        found |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        ends.append(found | {"pixel_threshold": float(task.pixel_threshold)})
        tables.append((folder / "test_images.csv").read_bytes())
    assert {"val/selection", "val/pixel_aupr", "test/pixel_auroc", "test/aupro_0.3"} <= set(ends[0])
    assert all(math.isfinite(value) for value in ends[0].values())
    assert ends[0] == ends[1]
    assert tables[0] == tables[1]
