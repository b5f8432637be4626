"""A run that is cut anywhere and resumed ends with the same bits as one that was not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    state = {f"average.{k}": v for k, v in checkpoint["state_dict"].items()}
    state |= {f"raw.{k}": v for k, v in checkpoint["current_model_state"].items()}
    for index, moments in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
    return state, checkpoint


def assert_same_end(path, expected_path):
    state, checkpoint = weights(path)
    expected, expected_checkpoint = weights(expected_path)
    assert state.keys() == expected.keys()
    different = [k for k in state if not torch.equal(state[k], expected[k])]
    assert not different, f"{len(different)} of {len(state)} tensors differ, first {different[:3]}"
    assert checkpoint["global_step"] == expected_checkpoint["global_step"] == 18
    assert checkpoint["epoch"] == expected_checkpoint["epoch"]


class Copies(Callback):
    """Keeps a checkpoint of every moment at which Lightning would let one be written."""

    def __init__(self, folder):
        self.folder = folder

    def _save(self, trainer, moment):
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step:02d}-{moment}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


class Validations(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, *_):
        self.seen.append((trainer.current_epoch, trainer.global_step, float(trainer.callback_metrics["val/top1"])))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("full")
    seed_everything(7, verbose=False)
    validations = Validations()
    # The copies come last, as Lightning puts ModelCheckpoints last: after the averages were updated.
    callbacks = [*tiny.run_callbacks(folder), validations]
    copies = Copies(folder / "copies")
    trainer = tiny.trainer(folder, callbacks)
    trainer.callbacks.append(copies)
    trainer.fit(tiny.task(), datamodule=tiny.Data())
    return folder, validations.seen


MOMENTS = [f"step{s:02d}-batch" for s in (1, 5, 6, 7, 11, 12, 13, 17)]
MOMENTS += [f"step{s:02d}-{moment}" for s in (6, 12) for moment in ("validation", "epoch")]


@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_from_every_kind_of_checkpoint(moment, uninterrupted, tmp_path, tiny):
    full, validations = uninterrupted
    seed_everything(7, verbose=False)
    seen = Validations()
    trainer = tiny.trainer(tmp_path, [*tiny.run_callbacks(tmp_path), seen])
    trainer.fit(tiny.task(), datamodule=tiny.Data(), ckpt_path=str(full / "copies" / f"{moment}.ckpt"))
    assert_same_end(tmp_path / "checkpoints" / "last.ckpt", full / "checkpoints" / "last.ckpt")
    # Every validation that was still to come is held, at the same step and with the same result.
    step = int(moment[4:6])
    due = [v for v in validations if v[1] > step]
    assert [v for v in seen.seen if v[1] > step] == due


def program(tiny, folder, *arguments):
    root = Path(__file__).parents[2]
    command = [sys.executable, tiny.__file__, str(folder), *arguments]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_killed_in_the_middle_of_an_epoch_with_two_workers(uninterrupted, tmp_path, tiny):
    full, _ = uninterrupted
    killed = program(tiny, tmp_path, "die", "10")
    assert killed.returncode == -9, killed.stderr[-2000:]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 10
    shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "at_death.ckpt")
    resumed = program(tiny, tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    # The uninterrupted run read in its own process and with no worker: neither may matter.
    assert_same_end(tmp_path / "checkpoints" / "last.ckpt", full / "checkpoints" / "last.ckpt")
    assert not torch.equal(
        weights(tmp_path / "at_death.ckpt")[0]["raw.backbone.head.weight"],
        weights(tmp_path / "checkpoints" / "last.ckpt")[0]["raw.backbone.head.weight"],
    )
