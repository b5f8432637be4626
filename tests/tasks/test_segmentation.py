"""The task of segmentation: one inference for all, measures from one table, windows, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from zoo.data import Segmentation as RealData
from zoo.errors import UsageError
from zoo.tasks import Segmentation, load_task


@pytest.fixture(scope="module")
def finished(tmp_path_factory, segmentation):
    """A task after a fit with all metrics, its run folder and its trainer; not to be trained further."""
    folder = tmp_path_factory.mktemp("run")
    arguments = {"metrics": ["boundary_f1", "hd95", "dice_image"], "loss": "ce_dice"}
    task, trainer = segmentation.fitted(folder, callbacks=[segmentation.best(folder)], epochs=12, **arguments)
    return task.eval(), folder, trainer


def counts(task, loader):
    """int64 (true, predicted) over all pixels with a class, through nothing but `inference`."""
    table = np.zeros((3, 3), np.int64)
    for batch in loader:
        with torch.no_grad():
            classes = task.inference(batch["image"]).argmax(1).numpy()
        mask = batch["mask"].numpy()
        for true in range(3):
            for predicted in range(3):
                table[true, predicted] += ((mask == true) & (classes == predicted)).sum()
    return table


def test_shapes_and_the_two_forms_of_an_image(finished):
    task = finished[0]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits, again = task.inference(images), task(images.float() / 255)
    assert logits.shape == (2, 3, 32, 32)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, again, rtol=1e-5, atol=1e-5)


def test_it_learns_and_logs_what_the_table_says(finished, segmentation):
    task, _, trainer = finished
    table = counts(task, segmentation.Data().val_dataloader())
    right, predicted, true = np.diag(table), table.sum(0), table.sum(1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # One table of integers: nothing but the last division is rounded.
    assert logged["val/miou"] == pytest.approx((right / (predicted + true - right)).mean(), abs=1e-6)
    assert logged["val/dice"] == pytest.approx((2 * right / (predicted + true)).mean(), abs=1e-6)
    assert logged["val/pixel_accuracy"] == pytest.approx(right.sum() / table.sum(), abs=1e-6)
    assert {"val/boundary_f1", "val/hd95", "val/dice_image", "val/loss", "train/loss"} <= set(logged)
    assert logged["val/miou"] > 0.6  # a third is guessing; easy images, a dozen epochs


def test_one_inference_for_all(finished, segmentation):
    task = finished[0]
    batch = next(iter(segmentation.Data().val_dataloader()))
    calls = []
    inference = task.inference
    task.inference = lambda images: calls.append(len(images)) or inference(images)
    task.log = lambda *args, **kwargs: None
    try:
        with torch.no_grad():
            wanted = inference(batch["image"]).argmax(1)
            predicted = task.predict_step(batch, 0)
            tested = task.test_step(batch, 0)
            validated = task.validation_step(batch, 0)
            task.forward(batch["image"])
        assert calls == [4, 4, 4, 4]
        for found in (predicted, tested["classes"], validated["classes"]):
            assert torch.equal(found, wanted)
        assert set(tested) == {"classes", "image", "mask", "path"}
    finally:
        del task.inference, task.log
        task.measures["test"].reset()


def test_a_checkpoint_needs_nothing_but_itself(finished, segmentation):
    _, folder, _ = finished
    again, _ = load_task(folder / "checkpoints" / "best.ckpt")
    assert isinstance(again, Segmentation)
    assert again.class_names == segmentation.NAMES
    assert again.hparams["ignore_index"] == segmentation.VOID
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    assert again.export_meta()["palette"][1] == [60, 180, 75]  # the second colour of every list without its own


def test_the_record_has_every_class(finished, segmentation):
    folder = finished[1]
    task, runner = segmentation.fitted(folder / "two", callbacks=finished[0].reports(), epochs=1)
    table = counts(task.eval(), segmentation.Data().val_dataloader())
    found = json.loads((folder / "two" / "record.json").read_text())
    iou = np.diag(table) / (table.sum(0) + table.sum(1) - np.diag(table))
    assert [found["val"]["per_class"][name]["iou"] for name in segmentation.NAMES] == pytest.approx(iou, abs=1e-5)
    assert found["val"]["images"] == 6
    assert found["images_per_second"] > 0
    assert (found["head"], found["steps"]) == ("fpn", 4)
    runner.test(task, datamodule=segmentation.Data(), verbose=False)
    found = json.loads((folder / "two" / "record.json").read_text())
    assert found["test"]["images"] == 7
    assert found["test"]["miou"] == pytest.approx(float(runner.callback_metrics["test/miou"]), abs=1e-6)


def test_outputs_of_deep_supervision_are_weighted(segmentation):
    options = {"hidden_channels": 16, "bins": [1, 2], "dropout": 0.0, "deep_supervision": True}
    task = segmentation.task(
        head="upernet", head_options=options, loss_weights=[1.0, 0.4], class_weights=[1.0, 2.0, 3.0]
    )
    task._class_weights = torch.tensor([1.0, 2.0, 3.0])
    task.log = lambda *args, **kwargs: None
    batch = next(iter(segmentation.Data().train_dataloader()))
    task.train()
    outputs = task.segmenter(task._normalise(batch["image"]))
    assert len(outputs) == 2
    wanted = sum(
        weight * F.cross_entropy(logits, batch["mask"], torch.tensor([1.0, 2.0, 3.0]), ignore_index=segmentation.VOID)
        for weight, logits in zip((1.0, 0.4), outputs, strict=True)
    )
    torch.testing.assert_close(task._loss(outputs, batch["mask"], training=True), wanted)
    with torch.no_grad():
        assert task.eval().inference(batch["image"]).shape == (4, 3, 32, 32)


@pytest.mark.parametrize(("given", "wanted"), [("median", [0.5, 1.0, 2.0]), ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0])])
def test_class_weights_come_from_the_data_or_the_recipe(given, wanted, segmentation, tmp_path):
    task, _ = segmentation.fitted(tmp_path, epochs=1, class_weights=given)
    assert task._class_weights.tolist() == wanted


def test_windows_are_used_where_asked_for_or_needed(segmentation, tmp_path):
    task = segmentation.task(window=(16, 32), window_overlap=8).eval()
    sizes = []
    inference = task.inference
    task.inference = lambda images: sizes.append(tuple(images.shape[-2:])) or inference(images)
    with torch.no_grad():
        assert task.classes(torch.zeros(1, 3, 40, 50, dtype=torch.uint8)).shape == (1, 40, 50)
    assert set(sizes) == {(16, 32)}
    # An encoder that takes images of one size alone sees others through windows of that size.
    fixed = segmentation.task(backbone="convit_tiny")
    assert fixed.window == (32, 32)
    assert fixed.export_meta()["any_size"] is False
    with pytest.raises(UsageError, match="32 x 32 alone"):
        segmentation.task(backbone="convit_tiny", window=48)
    with pytest.raises(UsageError, match="window=-4"):
        segmentation.task(window=-4)
    runner = segmentation.trainer(tmp_path, max_epochs=1)
    found = runner.validate(task, datamodule=segmentation.Data(size=(40, 50)), verbose=False)[0]
    assert "val/loss" not in found
    assert 0 <= found["val/miou"] <= 1


def test_another_network_or_other_classes_are_refused(segmentation):
    task = segmentation.task()
    for other, words in (
        ({"head": "segformer", "head_options": {"embed_dim": 16}}, "head"),
        ({"class_names": ["ground", "square", "circle"]}, "another data set"),
        ({"class_names": ["ground", "square"]}, "2 classes"),
    ):
        saved = dict(segmentation.task(**other).hparams)
        with pytest.raises(UsageError, match=words):
            task.on_load_checkpoint({"hyper_parameters": saved})
    task.on_load_checkpoint({"hyper_parameters": dict(task.hparams)})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"class_names": ["one"]}, "two or more"),
        ({"class_names": ["a", "a"]}, "twice"),
        ({"ignore_index": 1}, "number of a class"),
        ({"palette": [[0, 0, 0]]}, "1 entries for 3 classes"),
        ({"class_weights": [1.0]}, "1 entries for 3 classes"),
        ({"loss": "ce-dice"}, "ce_dice"),
        ({"metrics": ["hd"]}, "hd95"),
        ({"head": "fnp"}, "fpn"),
        ({"backbone": "resnet19"}, "resnet18"),
        ({"window": 1}, "at least 2"),
        ({"window": 16, "window_overlap": 9}, "0 to 8"),
        ({"window_overlap": 4}, "give window"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"img_size": 0}, "positive"),
        ({"head_options": {"img_size": 64}}, "head_options holds img_size"),
    ],
)
def test_bad_values_are_one_sentence(given, words, segmentation):
    with pytest.raises(UsageError, match=words) as caught:
        segmentation.task(**given)
    assert "\n" not in str(caught.value)


def test_counting_weights_needs_data_that_can(segmentation, tmp_path):
    loader = segmentation.Data().train_dataloader()
    with pytest.raises(UsageError, match="cannot count"):
        segmentation.trainer(tmp_path).fit(segmentation.task(class_weights="median"), loader)


def test_a_run_goes_on_as_if_it_had_not_stopped(segmentation, tmp_path):
    """From the checkpoint after its first epoch, with another state of the random numbers, to the same bits."""

    def fit(folder, seed, resume=None):
        data = RealData("samples:segmentation", crop_size=32, batch_size=16, num_workers=0, hflip=0.5, seed=3)
        torch.manual_seed(seed)
        task = segmentation.task(class_names=data.class_names, ignore_index=255)
        every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        runner = segmentation.trainer(folder, [every], max_epochs=2, limit_val_batches=1)
        runner.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
        return task.state_dict()

    whole = fit(tmp_path / "a", 5)
    resumed = fit(tmp_path / "b", 6, tmp_path / "a" / "epoch=0.ckpt")
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
