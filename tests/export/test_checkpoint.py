"""From a real run's checkpoint to the exported file: the same accuracy, the run's own preprocessing, no code run."""

import csv
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import UsageError
from zoo.export import Predictor, predictor, to_onnx

lightning = pytest.importorskip("lightning.pytorch", reason="needs the train extra")

NAMES = ["bright", "dark", "striped"]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def picture(kind, seed):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 90, (37, 45, 3))
    if kind == "bright":
        pixels += 120
    elif kind == "striped":
        pixels[:, (np.arange(45) + seed) % 8 < 4] += 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 40), ("val", 20)):
        for number, kind in enumerate(NAMES):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                # Every fourth of val lies in the wrong folder, so that the accuracy is neither full nor chance.
                shown = NAMES[(number + 1) % 3] if split == "val" and index % 4 == 0 else kind
                picture(shown, 1000 * number + index + (500 if split == "val" else 0)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Checkpoint of a short run, and the validation accuracy that the run itself measured."""
    from zoo.data import ImageClassification
    from zoo.tasks import AtomicCheckpointIO, Classification

    lightning.seed_everything(0, verbose=False)
    folder = tmp_path_factory.mktemp("run")
    data = ImageClassification(
        str(images), img_size=32, batch_size=24, num_workers=0, crop_pct=0.9, crop_mode="squash", interpolation="box"
    )
    task = Classification(
        "vit_tiny_patch16_224", data.class_names, img_size=32, backbone_options=SMALL, lr=2e-3, weight_decay=0.0
    )
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "best.ckpt")
    return folder / "best.ckpt", float(trainer.callback_metrics["val/top1"])


@pytest.fixture(scope="module")
def model(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    to_onnx(run[0], path)
    return path


pytestmark = pytest.mark.filterwarnings("ignore")


def test_accuracy_is_the_runs_own(run, model, images):
    counted = Predictor(model).accuracy(images / "val")
    assert counted.images == 60
    assert 0.5 < run[1] < 0.95
    # Exactly: one of 60 images on the other side of a tie would be 1.7 points.
    assert counted.top1 == pytest.approx(run[1], abs=1e-6)


def test_preprocessing_is_the_runs_own(run, model, images):
    from zoo.data import ImageClassification

    opened = Predictor(model)
    assert (opened.crop_pct, opened.crop_mode, opened.resample) == (0.9, "squash", Image.Resampling.BOX)
    assert opened.class_names == NAMES
    saved = torch.load(run[0], weights_only=True)["datamodule_hyper_parameters"]
    batch, _ = next(iter(ImageClassification(**saved).val_dataloader()))[:2]
    paths = sorted((images / "val" / "bright").iterdir())[:3]
    pixels = [opened.preprocess(path) for path in paths]
    wanted = {image.numpy().tobytes() for image in batch}
    assert all(image.tobytes() in wanted for image in pixels)


def test_option_given_by_hand_wins(run, tmp_path):
    to_onnx(run[0], tmp_path / "m.onnx", preprocess={"crop_pct": 1.0})
    opened = Predictor(tmp_path / "m.onnx")
    assert (opened.crop_pct, opened.crop_mode) == (1.0, "squash")


def test_checkpoint_predicts_like_its_export(run, model, images, tmp_path, capsys):
    from zoo.export.checkpoint import open_model

    tables = []
    for path in (run[0], model):
        out = tmp_path / path.suffix
        assert predictor.main([str(path), str(images / "val"), "--out", str(out)], open_model, "zoo predict") == 0
        with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["path"], ours["label"]) == (theirs["path"], theirs["label"])
        # Logits agree to 1e-4, and a probability moves at most a quarter as fast as a logit.
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-4)
    capsys.readouterr()
    assert predictor.main([str(run[0])], open_model, "zoo predict") == 2
    assert "usage: zoo predict" in capsys.readouterr().err


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_is_refused_and_not_run(run, tmp_path):
    saved = torch.load(run[0], weights_only=True)
    saved["callbacks"] = {"trap": Trap(tmp_path / "sprung")}
    torch.save(saved, tmp_path / "trap.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("trap.ckpt", "bare.ckpt"):
        with pytest.raises(UsageError, match=name):
            to_onnx(tmp_path / name, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="could run code; it is refused"):
        to_onnx(tmp_path / "trap.ckpt", tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.ckpt", "trap.ckpt"]


def test_bad_checkpoints(run, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(run[0].read_bytes()[:5000])
    saved = torch.load(run[0], weights_only=True)
    saved["hyper_parameters"]["backbone_options"] = SMALL | {"embed_dim": 48}
    torch.save(saved, tmp_path / "other.ckpt")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    for path, message in (
        (tmp_path / "none.ckpt", "there is no weights file or checkpoint"),
        (cut, "damaged|cannot be read"),
        (tmp_path / "other.ckpt", "do not fit backbone"),
        (folder, r"is a folder; give its checkpoint .*best\.ckpt"),
    ):
        with pytest.raises(UsageError, match=message):
            to_onnx(path, tmp_path / "m.onnx")
        assert not list(tmp_path.glob("*.onnx")) + list(tmp_path.glob(".*part"))
