"""A tiny run of the task: synthetic images, resumable loader, EMA, mixup and drop path; also a program to be killed.

As a program: tiny_run.py FOLDER full|die|resume [BATCHES UNTIL DEATH].
"""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.tasks import AtomicCheckpointIO, Classification
from zoo.tasks.callbacks import LastCheckpoint

CLASSES = ("stripes", "dots", "plain")
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}


class Images(Dataset):
    """Class 0 has stripes, 1 dots, 2 noise only; pixels are a function of (epoch, index)."""

    def __init__(self, length: int, size: int = 16):
        self.length, self.size = length, size

    def __len__(self):
        return self.length

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.randint(0, 80, (3, self.size, self.size), generator=generator, dtype=torch.uint8)
        target = index % 3
        if target == 0:
            image[:, ::4] += 150
        elif target == 1:
            image[:, ::4, ::4] += 150
        return image, target


class EpochOrder(Sampler):
    def __init__(self, length: int, shuffle: bool):
        self.length, self.shuffle, self.epoch, self.start = length, shuffle, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))
        start, self.start = self.start, 0
        return iter([(self.epoch if self.shuffle else 0, int(i)) for i in order[start:]])

    def __len__(self):
        return self.length


class Loader(DataLoader):
    """Counts the batches handed out.

    Lightning makes the iterator before it restores or announces the epoch, and after a checkpoint from the last batch
    goes on with the next epoch: so epoch and state are looked at only when a batch is asked for.
    """

    done = 0
    resumed = (-1, 0)

    def __iter__(self):
        epoch, done = self.resumed
        self.done = done if self.sampler.epoch == epoch else 0
        self.resumed = (-1, 0)
        self.sampler.start = self.done * self.batch_size
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self):
        return {"epoch": self.sampler.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.resumed = (state["epoch"], state["done"])


class Data(LightningDataModule):
    def __init__(self, length=24, batch_size=4, workers=0, mixup=True, val_length=9, size=16):
        super().__init__()
        self.save_hyperparameters()
        self.class_names = list(CLASSES)
        self.skipped = {}

    def _loader(self, length, shuffle):
        data = Images(length, self.hparams.size)
        return Loader(
            data,
            self.hparams.batch_size,
            sampler=EpochOrder(length, shuffle),
            num_workers=self.hparams.workers,
            drop_last=shuffle,
        )

    def train_dataloader(self):
        return self._loader(self.hparams.length, True)

    def val_dataloader(self):
        return self._loader(self.hparams.val_length, False)

    def test_dataloader(self):
        return self._loader(self.hparams.val_length, False)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, targets = batch
        images = images.float() / 255
        if self.trainer.training and self.hparams.mixup:
            seed = 100 * self.trainer.current_epoch + self.trainer.fit_loop.batch_idx
            share = torch.rand((), generator=torch.Generator().manual_seed(seed))
            images = share * images + (1 - share) * images.flip(0)
            hot = torch.nn.functional.one_hot(targets, 3).float()
            targets = share * hot + (1 - share) * hot.flip(0)
        return images, targets


def task(**arguments):
    defaults = {"img_size": 16, "class_names": CLASSES, "backbone_options": SMALL, "lr": 5e-3, "warmup_epochs": 0.5}
    return Classification(**({"backbone": "vit_tiny_patch16_224"} | defaults | arguments))


def trainer(folder, callbacks=(), **arguments):
    defaults = {
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "plugins": [AtomicCheckpointIO()],
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | arguments))


def run_callbacks(folder):
    checkpoints = str(Path(folder) / "checkpoints")
    best = ModelCheckpoint(checkpoints, "best", monitor="val/top1", mode="max", enable_version_counter=False)
    return [EMAWeightAveraging(decay=0.9), best, LastCheckpoint(every_n_train_steps=2, dirpath=checkpoints)]


class Die(Callback):
    """Kills the process, without any clean-up, when batch number `batches` of its run is about to start.

    Args:
        marker: a file that is made before; where it exists nobody dies, so that a resumed run lives.
    """

    def __init__(self, batches: int, marker: str = ""):
        self.left, self.marker = batches, marker

    def on_train_batch_start(self, *_):
        if self.left == 0 and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def main(folder: str, mode: str, batches: str = "0") -> None:
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
    callbacks = run_callbacks(folder) + ([Die(int(batches))] if mode == "die" else [])
    last = Path(folder) / "checkpoints" / "last.ckpt"
    trainer(folder, callbacks).fit(
        task(), datamodule=Data(workers=2), ckpt_path=str(last) if mode == "resume" else None
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
