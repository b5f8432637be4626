"""From the checkpoint of a real detector to the exported file: the task's own scores, threshold, fit and tiles."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import UsageError
from zoo.export import Predictor, predictor, to_onnx
from zoo.export.checkpoint import open_model

pytest.importorskip("lightning.pytorch", reason="needs the train extra")
pytest.importorskip("zoo.tasks.anomaly")

# What depends on the run's data alone, and not on the method, is exported once.
one_method = pytest.mark.parametrize("task", ["memory_bank"], indirect=True, scope="module")


def picture(height, width, seed):
    coarse = np.random.default_rng(seed).integers(60, 200, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(task, path, **data):
    task.threshold.fill_(1.25)
    task.pixel_threshold.fill_(0.75)
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content | {"datamodule_hyper_parameters": data}, path)
    return path


@pytest.fixture(scope="module", params=["l2bt", "memory_bank"])
def task(request):
    from zoo.tasks import AnomalyDetection

    torch.manual_seed(0)
    made = AnomalyDetection(request.param, "test_efficientnet", layers=[1, 2], img_size=32)
    images = torch.stack([torch.tensor(picture(32, 32, seed)).permute(2, 0, 1) for seed in range(8)])
    if not made.detector.head.needs_gradient:
        made.detector.update((images / 255 - 0.45) / 0.25)
    made.detector.finalize()
    return made.eval()


@pytest.fixture(scope="module")
def checkpoint(task, tmp_path_factory):
    return save(task, tmp_path_factory.mktemp("run") / "best.ckpt", resize="pad")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return to_onnx(checkpoint, tmp_path_factory.mktemp("exported") / "model.onnx")


def test_answers_are_the_tasks_own(task, exported):
    """At the size of the model, where nothing is resized."""
    images = [picture(32, 32, seed) for seed in range(20, 26)]
    results = Predictor(exported.path).predict(images)
    with torch.no_grad():
        score, anomaly_map = task.inference(torch.stack([torch.tensor(i).permute(2, 0, 1) for i in images]))
    # The criterion of the project.
    np.testing.assert_allclose([result.score for result in results], score.numpy(), rtol=1e-4)
    for result, expected in zip(results, anomaly_map.numpy(), strict=True):
        np.testing.assert_allclose(result.map, expected[0], atol=1e-4 * expected.max())
        assert result.label == ("defect" if result.score > 1.25 else "good")


def test_metadata_is_the_tasks_own(task, exported):
    entries = Predictor(exported.path).metadata
    assert (float(entries["zoo.threshold"]), float(entries["zoo.pixel_threshold"])) == (1.25, 0.75)
    assert (entries["zoo.method"], entries["zoo.backbone"]) == (task.hparams["method"], "test_efficientnet")
    assert (json.loads(entries["zoo.img_size"]), entries["zoo.resize"]) == ([32, 32], "pad")
    assert json.loads(entries["zoo.layers"]) == [1, 2]


def test_checkpoint_and_export_say_the_same(checkpoint, exported, tmp_path, capsys):
    for number, size in enumerate([(50, 70), (20, 31), (32, 32)]):
        Image.fromarray(picture(*size, number)).save(tmp_path / f"{number}.png")
    tables = []
    for model in (checkpoint, exported.path):
        out = tmp_path / model.suffix
        arguments = [str(model), *(str(tmp_path / f"{n}.png") for n in range(3)), "--out", str(out)]
        assert predictor.main(arguments, open_model, "zoo predict") == 0
        tables.append((out / "predictions.csv").read_text().splitlines())
    assert len(tables[0]) == 4
    for ours, theirs in zip(*tables, strict=True):
        if not ours.startswith("path"):
            assert float(ours.split(",")[1]) == pytest.approx(float(theirs.split(",")[1]), rel=1e-4)
            assert ours.split(",")[2] == theirs.split(",")[2]
    capsys.readouterr()


def test_tiles_of_the_run(task, tmp_path):
    path = save(task, tmp_path / "tiled.ckpt", tile=40, tile_overlap=None)
    output = open_model(path).output
    assert (output.tile, output.overlap) == (40, 10)


@one_method
def test_a_task_in_a_run_is_exported_with_the_options_of_its_data(task, tmp_path, monkeypatch):
    """The threshold comes from scores by tiles; without them the file would judge others."""
    data = {"tile": 40, "tile_overlap": 10}
    want = to_onnx(save(task, tmp_path / "tiled.ckpt", **data), tmp_path / "a.onnx").path
    monkeypatch.setattr(task, "_trainer", SimpleNamespace(datamodule=SimpleNamespace(hparams=data)))
    path = to_onnx(task, tmp_path / "b.onnx").path
    metadata = Predictor(path).metadata
    assert json.loads(metadata["zoo.tile"]) == 40
    changing = {"zoo.max_relative_error"}
    wanted = Predictor(want).metadata
    assert {k: v for k, v in metadata.items() if k not in changing} == {
        k: v for k, v in wanted.items() if k not in changing
    }


@one_method
def test_16_bit_weights_of_a_run(task, tmp_path):
    """Measured on the run's own validation images."""
    (tmp_path / "good").mkdir()
    for number in range(20):
        Image.fromarray(picture(40, 48, number)).save(tmp_path / "good" / f"{number}.png")
    data = {"root": str(tmp_path), "img_size": 32, "val_split": 0.3, "num_workers": 0}
    data |= {"_class_path": "zoo.data.AnomalyDetection"}  # as the command line leaves it in a checkpoint
    result = to_onnx(save(task, tmp_path / "run.ckpt", **data), tmp_path / "m.onnx", half=True)
    assert (result.loss.images, result.loss.source) == (12, "validation images")
    # 11 bits of each weight are left: some thousandths of a map, and not nothing.
    assert 1e-6 < result.loss.map < 0.02
    assert json.loads(Predictor(result.path).metadata["zoo.half_loss"])["images"] == 12


def test_a_detector_without_a_threshold_is_refused(task, tmp_path):
    path = save(task, tmp_path / "run.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["threshold"] = torch.tensor(float("nan"))
    torch.save(content, path)
    with pytest.raises(UsageError, match="no threshold"):
        to_onnx(path, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
