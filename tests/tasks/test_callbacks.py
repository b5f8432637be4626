"""What a run shows and leaves behind."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from zoo.tasks.callbacks import LastCheckpoint, ProgressBar, RunReport
from zoo.tasks.callbacks.pictures import Mistake, draw_confusion_matrix, draw_mistakes
from zoo.tasks.callbacks.record import recipe_of


@pytest.fixture
def run(tiny, tmp_path):
    task, data, report = tiny.task(), tiny.Data(), RunReport()
    data.skipped = {"b/2.jpg": "truncated", "a/1.jpg": "no image"}
    trainer = tiny.trainer(tmp_path, [report], max_epochs=2)
    trainer.fit(task, datamodule=data)
    return tmp_path, trainer, task, data


def assert_speed(record, images):
    """Both are rounded: the seconds, of which a tiny run takes few, to hundredths and the images a second to tenths."""
    seconds = record["train_seconds"]
    assert seconds > 0.005
    low, high = images / (seconds + 0.005), images / (seconds - 0.005)
    assert low - 0.1 < record["images_per_second"] < high + 0.1


def test_the_record_holds_the_facts(run, monkeypatch):
    folder, trainer, task, data = run
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"] == 12
    assert record["epochs_done"] == 2
    assert record["backbone"] == "vit_tiny_patch16_224"
    assert record["patch_size"] == 8
    assert record["img_size"] == [16, 16]
    assert record["batch_size"] == 4
    assert record["parameters"] == sum(p.numel() for p in task.backbone.parameters())
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert set(record["versions"]) == {"torch", "timm", "lightning", "python", "attnzoo"}
    assert_speed(record, images=48)
    assert record["peak_memory_gb"] > 0.05
    assert record["skipped_images"] == 2
    assert record["val"]["images"] == 9
    assert record["val"]["top1"] == pytest.approx(float(trainer.callback_metrics["val/top1"]), abs=1e-6)
    assert set(record["val"]["per_class"]) == {"stripes", "dots", "plain"}
    assert "test" not in record
    with open(folder / "skipped.csv") as file:
        assert list(csv.reader(file)) == [["image", "reason"], ["a/1.jpg", "no image"], ["b/2.jpg", "truncated"]]
    trainer.test(task, datamodule=data, verbose=False)
    tested = json.loads((folder / "record.json").read_text())
    assert tested["test"]["images"] == 9
    assert tested["val"] == record["val"]
    for name in ("confusion_matrix", "worst_mistakes", "test_confusion_matrix", "test_worst_mistakes"):
        with Image.open(folder / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_a_new_fit_forgets_the_old_test(run, tiny):
    folder, trainer, task, data = run
    trainer.test(task, datamodule=data, verbose=False)
    tiny.trainer(folder, [RunReport()], max_epochs=1).fit(tiny.task(), datamodule=data)
    assert "test" not in json.loads((folder / "record.json").read_text())


def test_no_skipped_file_without_skipped_images(tiny, tmp_path):
    tiny.trainer(tmp_path, [RunReport()], max_epochs=1).fit(tiny.task(), datamodule=tiny.Data())
    assert not (tmp_path / "skipped.csv").exists()


def test_seconds_and_images_survive_a_resume(tiny, tmp_path):
    saved = {}

    class Stop(Callback):
        def on_train_batch_end(self, trainer, task, *_):
            if trainer.global_step == 8:
                raise KeyError("cut")

    checkpoints = str(tmp_path / "checkpoints")
    report = RunReport()
    callbacks = [report, LastCheckpoint(every_n_train_steps=2, dirpath=checkpoints)]
    with pytest.raises(KeyError):
        tiny.trainer(tmp_path, [*callbacks, Stop()]).fit(tiny.task(), datamodule=tiny.Data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    saved = next(v for k, v in content["callbacks"].items() if "RunReport" in k)
    assert saved["images"] == 4 * content["global_step"]
    callbacks = [RunReport(), LastCheckpoint(every_n_train_steps=2, dirpath=checkpoints)]
    tiny.trainer(tmp_path, callbacks).fit(tiny.task(), datamodule=tiny.Data(), ckpt_path=str(path))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["train_seconds"] > saved["seconds"]
    assert_speed(record, images=18 * 4)


def test_collects_confusions_and_the_most_confident_mistakes():
    report = RunReport(mistakes=3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator) * 3
    targets = torch.randint(0, 5, (40,), generator=generator)
    images = torch.rand(40, 3, 8, 8, generator=generator)
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):
        report._collect(images[part], {"logits": logits[part], "targets": targets[part]})
    counts = np.zeros((5, 5), int)
    wrong = []
    for z, t, image in zip(logits.double(), targets.tolist(), images, strict=True):
        p = int(z.argmax())
        counts[t, p] += 1
        if p != t:
            wrong.append((float(z.softmax(0)[p]), t, p, image))
    assert np.array_equal(report._confusion.numpy(), counts)
    wrong.sort(key=lambda w: -w[0])
    for mistake, (probability, true, predicted, image) in zip(report._worst, wrong[:3], strict=True):
        assert (mistake.true, mistake.predicted) == (true, predicted)
        assert mistake.probability == pytest.approx(probability, rel=1e-5)
        assert np.array_equal(mistake.image, (image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("classes", [2, 10, 100, 300])
def test_pictures_of_few_and_of_many_classes(classes, tmp_path):
    generator = np.random.default_rng(0)
    counts = np.eye(classes, dtype=int) * 20 + generator.integers(0, 3, (classes, classes))
    names = [f"a rather long class name {i}" for i in range(classes)]
    draw_confusion_matrix(counts, names, tmp_path / "c.png", "validation")
    mistakes = [Mistake(generator.integers(0, 255, (16, 16, 3)).astype("uint8"), 0, 1, 0.9) for _ in range(7)]
    draw_mistakes(mistakes, names, tmp_path / "m.png", "mistakes")
    draw_mistakes([], names, tmp_path / "none.png", "mistakes")
    for name in ("c", "m", "none"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
            assert max(picture.size) < 2600
            assert pixels.std() > 3


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("fit --config quickstart", "quickstart"),
        ("--config=a fit --config b", "b"),
        ("fit", None),
        ("", None),
        ("fit -c x", "x"),
    ],
)
def test_recipe_of_a_command_line(line, recipe):
    assert recipe_of(line.split()) == recipe


class TestLastCheckpoint:
    def test_by_updates_and_at_the_end(self, tiny, tmp_path):
        steps = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, *_):
                if (tmp_path / "last.ckpt").exists():
                    steps.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])

        callbacks = [Look(), LastCheckpoint(every_n_train_steps=4, dirpath=str(tmp_path))]
        tiny.trainer(tmp_path, callbacks, max_epochs=3).fit(tiny.task(), datamodule=tiny.Data())
        # 18 updates, epochs of 6: the one due with the last batch of an epoch (12) waits for the epoch's end.
        assert steps == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 2
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 18

    def test_by_time(self, tiny, tmp_path):
        callback = LastCheckpoint(minutes=1, dirpath=str(tmp_path))

        class Clock(Callback):
            def on_train_batch_start(self, trainer, task, batch, batch_idx):
                if trainer.global_step == 2:
                    callback._last_time_checked -= 61

            def on_train_epoch_end(self, trainer, task):
                self.first = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]

        clock = Clock()
        tiny.trainer(tmp_path, [clock, callback], max_epochs=1).fit(tiny.task(), datamodule=tiny.Data())
        assert clock.first == 3
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6

    def test_one_file_only(self, tiny, tmp_path):
        for _ in range(2):
            callbacks = [LastCheckpoint(every_n_train_steps=2, dirpath=str(tmp_path / "c"))]
            tiny.trainer(tmp_path, callbacks, max_epochs=1).fit(tiny.task(), datamodule=tiny.Data())
        assert [p.name for p in (tmp_path / "c").iterdir()] == ["last.ckpt"]


class TestProgressBar:
    def test_without_a_terminal_one_line_per_epoch(self, tiny, tmp_path, capsys):
        trainer = tiny.trainer(tmp_path, [ProgressBar()], max_epochs=2, enable_progress_bar=True)
        trainer.fit(tiny.task(), datamodule=tiny.Data())
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Epoch")]
        assert len(lines) == 2
        for epoch, line in enumerate(lines, 1):
            assert re.match(rf"Epoch {epoch}/2 .*train/loss \d.*val/top1 \d.*images/s [\d,]+", line), line

    def test_in_a_terminal(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        bar = ProgressBar()
        assert bar._live
        trainer = tiny.trainer(tmp_path, [bar], max_epochs=2, enable_progress_bar=True)
        task = tiny.task()
        trainer.fit(task, datamodule=tiny.Data())
        assert bar._rate > 0
        trainer.test(task, datamodule=tiny.Data(), verbose=False)
