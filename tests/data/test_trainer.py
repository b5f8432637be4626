"""What a real Lightning trainer hands to a task: resumed epochs, several processes, batches of damaged images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from zoo.data import ImageClassification
from zoo.errors import UsageError

FOLDERS = {"train/a": 7, "train/b": 6, "val/a": 2, "val/b": 2}
EPOCHS, BATCHES = 3, 3  # 13 images in batches of 4, the rest is dropped


class Listener(LightningModule):
    """Notes what it is given; saves a checkpoint after the update `save_at`."""

    def __init__(self, path: Path | None = None, save_at: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.path, self.save_at = path, save_at
        self.seen: list[tuple[int, int, bytes, bytes]] = []
        self.validated: list[int] = []

    def training_step(self, batch, number):
        images, targets = batch
        self.seen.append((self.current_epoch, number, images.numpy().tobytes(), targets.numpy().tobytes()))
        return self.weight * images.mean()

    def validation_step(self, batch, number):
        self.validated.append(self.current_epoch)

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, data, folder, checkpoint=None, **options) -> Listener:
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | options
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def make(root, **options):
    return ImageClassification(str(root), **({"img_size": 8, "batch_size": 4, "num_workers": 0} | options))


SHAKEN = {"auto_augment": "rand-m9-mstd0.5", "vflip": 0.5, "mixup": 0.5, "cutmix": 1.0, "re_prob": 0.5}
PRELOADED = {"preload": True, "mixup": 0.5, "re_prob": 0.5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "workers"), [(SHAKEN, 0), (SHAKEN, 2), (PRELOADED, 0)])
def test_resumed_training_sees_the_remaining_batches_bit_for_bit(write, tmp_path, options, workers):
    root = write(FOLDERS)
    whole = fit(Listener(), make(root, **options), tmp_path).seen
    assert [one[:2] for one in whole] == [(epoch, number) for epoch in range(EPOCHS) for number in range(BATCHES)]
    assert len({one[2] for one in whole}) == len(whole)
    for done in (1, 3, 5):  # within the first epoch, at its end, within the second
        path = tmp_path / f"{done}.ckpt"
        fit(Listener(path, done), make(root, num_workers=workers, **options), tmp_path, max_epochs=2)
        resumed = fit(Listener(), make(root, num_workers=workers, **options), tmp_path, path).seen
        assert resumed == whole[done:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_with_a_batch_of_damaged_images_is_whole_and_validated(write, tmp_path, workers):
    root = write(FOLDERS)
    files = sorted((root / "train").rglob("*.png"))
    for file in files[:2]:
        file.write_bytes(b"damaged")
    data = make(root, batch_size=1, num_workers=workers)
    module = fit(Listener(), data, tmp_path, max_epochs=2)
    assert [one[:2] for one in module.seen] == [(epoch, number) for epoch in range(2) for number in range(13)]
    assert module.validated == [0] * 4 + [1] * 4
    assert sorted(data.skipped) == [str(file) for file in files[:2]]
    assert fit(Listener(), make(root, batch_size=1), tmp_path, max_epochs=2).seen == module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_readable_image_at_all_is_a_plain_message(write, split):
    root = write(FOLDERS)
    for file in (root / split).rglob("*.png"):
        file.write_bytes(b"damaged")
    data = make(root)
    with pytest.raises(UsageError, match=r"none of these images can be read, such as .*\.png: "):
        list(data.train_dataloader() if split == "train" else data.val_dataloader())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preload", [False, True])
def test_overfit_batches_repeats_the_first_batches(write, tmp_path, preload):
    data = make(write(FOLDERS, size=(8, 8)), preload=preload, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    seen = fit(Listener(), data, tmp_path, max_epochs=2, overfit_batches=2).seen
    assert [one[:2] for one in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [one[3] for one in seen[:2]] == [np.zeros(4, np.int64).tobytes(), np.array([0, 0, 0, 1]).tobytes()]
    assert [one[2] for one in seen[:2]] == [one[2] for one in seen[2:]]


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from zoo.data import ImageClassification

class Listener(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {"train": [], "val": []}
    def on_train_end(self):  # in the process that saw it
        Path(out, f"{self.global_rank}.json").write_text(json.dumps(self.seen))
    def training_step(self, batch, number):
        self.seen["train"] += (batch[0].mean((1, 2, 3)) * 255).round().int().tolist()
        return self.weight * batch[0].mean()
    def validation_step(self, batch, number):
        self.seen["val"] += (batch[0].mean((1, 2, 3)) * 255).round().int().tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

root, out = sys.argv[1:]
data = ImageClassification(root, img_size=8, batch_size=2, num_workers=0)
off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, num_sanity_val_steps=0, **off)
trainer.fit(Listener(), datamodule=data)
"""


def test_two_processes_see_every_image_once_between_them(tmp_path):
    tones = {"train": range(10, 90, 10), "val": range(110, 180, 10)}  # 8 and 7 pictures of one tone each
    for split, values in tones.items():
        for number, tone in enumerate(values):
            folder = tmp_path / "data" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (tone,) * 3).save(folder / f"{number}.png")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(program), str(tmp_path / "data"), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert sorted(first["train"] + second["train"]) == list(tones["train"])
    assert len(first["train"]) == len(second["train"])
    # Seven images for two processes: one of them is seen twice.
    assert sorted({*first["val"], *second["val"]}) == list(tones["val"])
    assert len(first["val"]) == len(second["val"]) == 4
