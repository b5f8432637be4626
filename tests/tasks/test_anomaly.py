"""The task of anomaly detection: one inference, a threshold that no test image can reach, and what it refuses."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.metrics import average_precision_score, roc_auc_score

from zoo.errors import UsageError
from zoo.tasks import AnomalyDetection, NonFiniteLossError, load_task
from zoo.tasks.anomaly_metrics import Measures
from zoo.tasks.callbacks import ProgressBar

METHODS = ("l2bt", "memory_bank")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, anomaly):
    """Method -> (task after a fit, its run folder, its trainer); not to be trained further."""
    runs = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        task, trainer = anomaly.fitted(folder, method, callbacks=anomaly.run_callbacks(folder))
        runs[method] = task.eval(), folder, trainer
    return runs


def outputs(loader, task):
    """Score, map, mask and label of every image, through nothing but `inference`."""
    batches = list(loader)
    with torch.no_grad():
        found = [task.inference(batch["image"]) for batch in batches]
    parts = [
        [out.score for out in found],
        [out.map for out in found],
        [b["mask"] for b in batches],
        [b["label"] for b in batches],
    ]
    return [torch.cat(part).numpy() for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_the_two_forms_of_an_image(method, finished, anomaly):
    task = finished[method][0]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        out, again = task.inference(images), task(images.float() / 255)
    assert out.score.shape == (3,)
    assert out.map.shape == (3, 1, 32, 32)
    assert out.score.dtype == out.map.dtype == torch.float32
    torch.testing.assert_close(out.map, again.map, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_inference_for_all(method, finished, anomaly):
    task = finished[method][0]
    batch = next(iter(anomaly.Data().val_dataloader()))
    calls = []
    inference = task.inference
    task.inference = lambda images: calls.append(len(images)) or inference(images)
    try:
        with torch.no_grad():
            wanted = inference(batch["image"])
            predicted = task.predict_step(batch, 0)
            tested = task.test_step(batch, 0)
            task.forward(batch["image"])
        assert calls == [4, 4, 4]
        for got in (predicted.map, tested["map"]):
            assert torch.equal(got, wanted.map)
        assert {"score", "map", "path", "image", "mask", "label", "kind"} <= set(tested)
    finally:
        del task.inference
        task.measures["test"].reset()


def test_a_whole_image_is_looked_at_by_tiles_of_its_own_pixels(finished):
    task = finished["memory_bank"][0]
    image = torch.randint(0, 256, (1, 3, 32, 80), dtype=torch.uint8)
    with torch.no_grad():
        found = task.predict_step({"image": image, "tile": 32, "tile_overlap": 8}, 0)
        # Three tiles of 32 pixels, which share 8, begin at 0, 24 and 48.
        tiles = [task.inference(image[..., left : left + 32]) for left in (0, 24, 48)]
    assert found.map.shape == (1, 1, 32, 80)
    assert float(found.score) == pytest.approx(max(float(tile.score) for tile in tiles), rel=1e-5)
    # Where only one tile lies, the map is that tile's.
    torch.testing.assert_close(found.map[..., :24], tiles[0].map[..., :24], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.map[..., 56:], tiles[2].map[..., 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_logged_is_what_sklearn_finds(method, finished, anomaly):
    task, folder, _ = finished[method]
    data = anomaly.Data()
    trainer = anomaly.trainer(folder)
    trainer.test(task, datamodule=data, verbose=False)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    scores, maps, masks, labels = outputs(data.test_dataloader(), task)
    # The project's pixel metrics are binned: exact to 1e-4 is what they promise.
    wanted = {
        "test/image_auroc": (roc_auc_score(labels, scores), 1e-6),
        "test/image_aupr": (average_precision_score(labels, scores), 1e-6),
        "test/pixel_auroc": (roc_auc_score(masks.ravel(), maps.ravel()), 1e-4),
        "test/pixel_aupr": (average_precision_score(masks.ravel(), maps.ravel()), 1e-4),
    }
    for name, (value, tolerance) in wanted.items():
        assert logged[name] == pytest.approx(value, abs=tolerance), name
    called = scores > float(task.threshold)
    found = (called & (labels == 1)).sum()
    assert logged["test/f1"] == pytest.approx(2 * found / (called.sum() + labels.sum()), abs=1e-6)
    assert logged["test/recall"] == pytest.approx(found / labels.sum(), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_spots_are_found(method, finished, anomaly):
    task, _, trainer = finished[method]
    assert float(trainer.callback_metrics["val/pixel_auroc"]) > 0.9
    scores, _, _, labels = outputs(anomaly.Data().val_dataloader(), task)
    assert scores[labels == 0].max() < float(task.threshold) < scores[labels == 1].min()


def state_of(path):
    content = torch.load(path, weights_only=True)
    return content["state_dict"], content


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [{"test_lie": True}, {"test_seed": 9}], ids=["labels and masks", "images"])
def test_no_test_image_mask_or_label_reaches_threshold_or_checkpoint(method, change, finished, anomaly, tmp_path):
    ends = {}
    for name, arguments in (("one", {}), ("other", change)):
        folder = tmp_path / name
        data = anomaly.Data(**arguments)
        task, trainer = anomaly.fitted(folder, method, data, anomaly.run_callbacks(folder))
        fitted = float(task.threshold)
        assert math.isfinite(fitted)
        files = {f.name: f.read_bytes() for f in (folder / "checkpoints").iterdir()}
        before = copy.deepcopy(task.state_dict())
        trainer.test(task, datamodule=data, verbose=False)
        # A test leaves no trace in the weights, the threshold or the files.
        assert float(task.threshold) == fitted
        assert anomaly.differing(before, task.state_dict()) == []
        assert files == {f.name: f.read_bytes() for f in (folder / "checkpoints").iterdir()}
        ends[name] = folder, {k: float(v) for k, v in trainer.callback_metrics.items()}
    # The test figures differ, so the change did arrive; the files do not.
    assert any(ends["one"][1][k] != ends["other"][1][k] for k in ends["one"][1] if k.startswith("test/"))
    for name in ("best.ckpt", "last.ckpt"):
        (one, content), (other, content_other) = (state_of(ends[n][0] / "checkpoints" / name) for n in ("one", "other"))
        assert "threshold" in one
        assert anomaly.differing(one, other) == []
        assert content["global_step"] == content_other["global_step"]


@pytest.mark.parametrize("method", METHODS)
def test_the_threshold_is_that_of_validation(method, finished, anomaly, tmp_path):
    # Other validation images, another threshold: so it does come from there.
    task = finished[method][0]
    other, _ = anomaly.fitted(tmp_path, method, anomaly.Data(val_good=8))
    assert float(other.threshold) != float(task.threshold)
    scores, *_ = outputs(anomaly.Data(val_good=8).val_dataloader(), other.eval())
    # Eight good images and no defect: 1 % of them may exceed it.
    assert float(other.threshold) == pytest.approx(np.quantile(scores, 0.99), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_selection_without_defects_prefers_good_images_that_do_not_stand_out(method, anomaly, tmp_path):
    _, trainer = anomaly.fitted(tmp_path, method, anomaly.Data(val_good=8))
    logged = trainer.callback_metrics
    assert float(logged["val/selection"]) == pytest.approx(-float(logged["val/good_score"]))
    assert "val/image_auroc" not in logged


@pytest.mark.parametrize("method", METHODS)
def test_unfitted_use_raises(method, anomaly, tmp_path):
    task = anomaly.task(method).eval()
    with pytest.raises(UsageError):
        task.inference(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UsageError, match="no threshold"):
        task.export_meta()
    with pytest.raises(UsageError):
        anomaly.trainer(tmp_path).test(task, datamodule=anomaly.Data(), verbose=False)


@pytest.mark.parametrize("method", METHODS)
def test_sanity_validation_waits_for_something_learned(method, anomaly, tmp_path):
    task = anomaly.task(method)
    trainer = anomaly.trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(task, datamodule=anomaly.Data())
    assert math.isfinite(float(task.threshold))


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_comes_back_whole_in_a_fresh_task(method, finished, anomaly):
    task, folder, _ = finished[method]
    loaded, data = load_task(folder / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, AnomalyDetection)
    assert not loaded.training
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.inference(images).map, task.inference(images).map)
    assert loaded.export_meta() == task.export_meta()
    assert data["batch_size"] == 4


@pytest.mark.parametrize("method", METHODS)
def test_hyperparameters_are_plain(method, anomaly):
    def check(value):
        assert value is None or type(value) in (str, int, float, bool, list, dict), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    task = anomaly.task(method, img_size=(np.int64(32), np.int64(32)), lr=np.float64(0.1))
    check(dict(task.hparams))
    assert task.hparams["img_size"] == [32, 32]
    meta = {k: v for k, v in task.hparams.items() if k in ("mean", "std")}
    assert all(len(v) == 3 for v in meta.values())


def test_only_the_students_learn(finished, anomaly, tmp_path):
    task = anomaly.task("l2bt")
    before = copy.deepcopy(task.state_dict())
    anomaly.trainer(tmp_path, max_epochs=1).fit(task, datamodule=anomaly.Data())
    changed = anomaly.differing(before, task.state_dict())
    assert changed
    assert not [k for k in changed if k.startswith("detector.teacher")]
    task.train()
    assert not task.detector.teacher.training
    parameters = [p for group in task.configure_optimizers().param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in task.detector.head.parameters()}


def test_the_loss_falls(anomaly, tmp_path):
    losses = []
    task = anomaly.task("l2bt")
    step = task.training_step

    def watched(batch, batch_idx):
        loss = step(batch, batch_idx)
        losses.append(float(loss))
        return loss

    task.training_step = watched
    anomaly.trainer(tmp_path, max_epochs=4).fit(task, datamodule=anomaly.Data())
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:3])


def test_a_loss_that_is_no_number_stops_the_run(anomaly, tmp_path):
    task = anomaly.task("l2bt")
    with torch.no_grad():
        next(task.detector.head.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="step 0"):
        anomaly.trainer(tmp_path).fit(task, datamodule=anomaly.Data())


def test_a_bank_takes_one_epoch_on_one_device(anomaly, tmp_path):
    with pytest.raises(UsageError, match=r"max_epochs 1, not 2"):
        anomaly.trainer(tmp_path, max_epochs=2).fit(anomaly.task("memory_bank"), datamodule=anomaly.Data())


# 1 is after every batch, 1.0 after the whole epoch.
@pytest.mark.parametrize(("interval", "given"), [(2, "2"), (1, "1"), (0.5, "0.5"), ("00:00:00:05", "a time")])
def test_a_bank_is_not_validated_before_it_is_full(interval, given, anomaly, tmp_path):
    trainer = anomaly.trainer(tmp_path, max_epochs=1, val_check_interval=interval)
    with pytest.raises(UsageError, match=rf"memory_bank .*give --trainer.val_check_interval 1\.0, not {given}$"):
        trainer.fit(anomaly.task("memory_bank"), datamodule=anomaly.Data())


def test_students_are_validated_at_any_interval(anomaly, tmp_path):
    task = anomaly.task("l2bt")
    anomaly.trainer(tmp_path, max_epochs=1, val_check_interval=2).fit(task, datamodule=anomaly.Data())
    assert math.isfinite(float(task.threshold))


def test_averaged_weights_are_refused(anomaly, tmp_path):
    with pytest.raises(UsageError, match="average the threshold"):
        anomaly.trainer(tmp_path, [EMAWeightAveraging()]).fit(anomaly.task(), datamodule=anomaly.Data())


def test_a_checkpoint_of_another_detector_is_refused(finished, anomaly, tmp_path):
    last = str(finished["l2bt"][1] / "checkpoints" / "last.ckpt")
    with pytest.raises(UsageError, match="method is 'l2bt'"):
        anomaly.trainer(tmp_path, max_epochs=1).fit(
            anomaly.task("memory_bank"), datamodule=anomaly.Data(), ckpt_path=last
        )


def test_good_images_alone_say_how_many_are_called_defective():
    measures = Measures()
    batch = {"label": torch.zeros(5, dtype=torch.int64), "mask": torch.zeros(5, 1, 4, 4, dtype=torch.bool)}
    measures.update(torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2]), torch.rand(5, 1, 4, 4), batch)
    values = measures.compute(0.5)
    assert values["false_alarms"] == pytest.approx(2 / 5, abs=1e-6)
    assert not {"f1", "recall", "image_auroc", "pixel_auroc"} & set(values)
    assert "false_alarms" not in measures.compute(math.nan)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "l3bt"}, "l2bt"),
        ({"backbone": "tf_efficientnet_lit0"}, "tf_efficientnet_lite0"),
        ({"optimizer": "adamm"}, "adam"),
        ({"lr": -1.0}, "negative"),
        ({"false_alarms": 1.0}, "false_alarms"),
        ({"img_size": 0}, "img_size"),
        ({"head_options": {"neighbors": 3}}, "neighbors"),
        ({"head_options": {"layers": [1]}}, "head_options holds layers"),
        ({"mean": [0.5, 0.5]}, "mean has 2 values"),
    ],
)
def test_wrong_arguments_say_what_is_valid(arguments, words, anomaly):
    with pytest.raises(UsageError, match=words):
        AnomalyDetection(**({"backbone": "test_efficientnet", "img_size": 32} | arguments))


def test_a_bank_says_how_far_its_choice_is(anomaly, tmp_path, capsys):
    arguments = {"max_epochs": 1, "enable_progress_bar": True}
    trainer = anomaly.trainer(tmp_path, [ProgressBar()], **arguments)
    trainer.fit(anomaly.task("memory_bank", head_options={"coreset": 0.5}), datamodule=anomaly.Data())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Memory bank")]
    assert re.fullmatch(r"Memory bank: places chosen ([\d,]+) of \1", lines[-1])


def test_a_bank_draws_its_choice_in_a_terminal(anomaly, tmp_path, monkeypatch):
    for name, value in (("TTY_COMPATIBLE", "1"), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    bar, drawn = ProgressBar(), []
    update = bar._update
    monkeypatch.setattr(bar, "_update", lambda *args, **more: drawn.append(args) or update(*args, **more))
    trainer = anomaly.trainer(tmp_path, [bar], max_epochs=1, enable_progress_bar=True)
    trainer.fit(anomaly.task("memory_bank", head_options={"coreset": 0.9}), datamodule=anomaly.Data())
    # 24 images of 8 x 8 places: the choice of nine tenths is told every so often, and its line goes when it is done.
    assert len([done for _, done in drawn if done > 24]) > 5
    assert bar._extra is None


def test_the_closing_lines_say_where_the_best_is(finished):
    task = finished["l2bt"][0]
    metrics = {"val/selection": 0.5, "val/image_auroc": 0.75, "val/pixel_aupr": 0.5}
    assert dict(task.headline(metrics, "val", 0.625))["best"].startswith("an earlier epoch: val/selection 0.6250")
    lines = dict(task.headline(metrics, "val", 0.5))
    assert lines["images"].startswith("AUROC 75.00%")
    assert f"{float(task.threshold):.6g}" in lines["threshold"]
    assert "best" not in lines
