"""Checkpoints: what they hold, that nothing in them is code, and that a failing write costs nothing."""

import os
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from zoo.errors import UsageError
from zoo.tasks import AtomicCheckpointIO, Classification, load_task
from zoo.tasks.callbacks import RunReport
from zoo.tasks.plain import plain


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.fixture
def checkpoint(tiny, tmp_path):
    callbacks = [RunReport(), Timer(duration={"hours": 1}), *tiny.run_callbacks(tmp_path)]
    trainer = tiny.trainer(tmp_path, callbacks, max_epochs=1)
    task = tiny.task(optimizer_options={"betas": (0.9, 0.95)}, label_smoothing=0.1)
    trainer.fit(task, datamodule=tiny.Data())
    return tmp_path / "checkpoints" / "last.ckpt", task


def test_everything_in_a_checkpoint_is_data(checkpoint):
    path, _ = checkpoint
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    content = torch.load(path, weights_only=True)
    assert any("Averaging" in key or "RunReport" in key or "Timer" in key for key in content["callbacks"])
    assert content["hyper_parameters"] == plain(content["hyper_parameters"])


def test_load_task_gives_the_network_back(checkpoint):
    path, trained = checkpoint
    task, data = load_task(path)
    assert data == {"length": 24, "batch_size": 4, "workers": 0, "mixup": True, "val_length": 9, "size": 16}
    assert task.class_names == ["stripes", "dots", "plain"]
    assert not task.training
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(task.inference(images), trained.eval().inference(images))
    meta = task.export_meta()
    assert meta["task"] == "classification"
    assert meta["img_size"] == [16, 16]
    assert meta["mean"] == [0.5, 0.5, 0.5]


def test_a_task_whose_pretrained_file_is_gone_loads(tiny, tmp_path):
    torch.save(tiny.task().backbone.state_dict(), tmp_path / "w.pth")
    task = tiny.task(pretrained=str(tmp_path / "w.pth"))
    trainer = tiny.trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "w.pth").unlink()
    load_task(tmp_path / "a.ckpt")


def test_a_pickle_with_code_is_refused_everywhere(tiny, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = checkpoint
    content = torch.load(path, weights_only=True) | {"extra": Code()}
    torch.save(content, tmp_path / "code.ckpt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content["hyper_parameters"] | {"extra": Code()}))
    for name in ("code.ckpt", "plain.pkl"):
        with pytest.raises(UsageError, match="refused"):
            load_task(tmp_path / name)
    with pytest.raises(UsageError, match="refused"):
        tiny.task(pretrained=str(tmp_path / "code.ckpt"))
    with pytest.raises(UsageError, match="refused"):
        tiny.trainer(tmp_path).fit(tiny.task(), datamodule=tiny.Data(), ckpt_path=str(tmp_path / "code.ckpt"))
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints(checkpoint, tmp_path):
    path, task = checkpoint
    with pytest.raises(UsageError, match="no weights file or checkpoint"):
        load_task(tmp_path / "missing.ckpt")
    data = path.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello world"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            load_task(tmp_path / name)
    torch.save(task.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="no checkpoint of a run"):
        load_task(tmp_path / "weights.pth")


def test_weights_of_another_network_under_these_hyperparameters(checkpoint, tmp_path):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["backbone_options"]["depth"] = 3
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=r"do not fit.*blocks\.2"):
        load_task(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["a", "b"]}, "3 classes, but the data has 2"),
        ({"class_names": ["stripes", "dots", "none"]}, "class 2 is 'plain', but the data's is 'none'"),
        ({"backbone": "vit_small_patch16_224"}, "backbone is 'vit_tiny_patch16_224'.*'vit_small_patch16_224'"),
        ({"backbone_options": None}, "backbone options"),
    ],
)
@pytest.mark.parametrize("function", ["fit", "test"])
def test_a_run_refuses_the_checkpoint_of_another(tiny, checkpoint, tmp_path, arguments, message, function):
    path, _ = checkpoint
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(UsageError, match=message):
        getattr(trainer, function)(tiny.task(**arguments), datamodule=tiny.Data(), ckpt_path=str(path))


class TestAtomicWriting:
    def test_a_write_that_fails_keeps_the_previous_file(self, tmp_path, monkeypatch):
        io, path = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
        io.save_checkpoint({"a": 1}, path)

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            io.save_checkpoint({"a": 2}, path)
        assert io.load_checkpoint(path) == {"a": 1}
        assert os.listdir(path.parent) == ["last.ckpt"]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
    def test_a_full_disk_is_an_oserror(self, tmp_path):
        (tmp_path / ".last.ckpt.part").symlink_to("/dev/full")
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "other.ckpt")
        with pytest.raises(OSError, match=r"space|disk full"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / "last.ckpt")
        assert sorted(os.listdir(tmp_path)) == ["other.ckpt"]

    def test_a_kill_while_writing_keeps_the_previous_file(self, tmp_path, monkeypatch):
        # What is on the disk in the moment before the rename is all that a kill can leave.
        io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
        io.save_checkpoint({"a": 1}, path)
        states = []
        rename = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: (states.append(io.load_checkpoint(path)), rename(a, b)))
        io.save_checkpoint({"a": 2}, path)
        assert states == [{"a": 1}]
        assert io.load_checkpoint(path) == {"a": 2}

    def test_read_only_folder(self, tmp_path):
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")


def test_hyperparameters_become_plain_types():
    import enum
    from pathlib import Path

    import numpy as np

    class Colour(enum.Enum):
        RED = "red"

    class Name(str):
        pass

    given = {"p": Path("a/b"), "n": np.float32(0.5), "c": Colour.RED, "t": (1, [2, None]), "s": Name("x"), 3: True}
    out = plain(given)
    assert out == {"p": "a/b", "n": 0.5, "c": "red", "t": [1, [2, None]], "s": "x", "3": True}
    assert type(out["s"]) is str
    with pytest.raises(TypeError, match="hyperparameter"):
        plain(object())


def test_numpy_values_do_not_reach_the_checkpoint(tiny):
    import numpy as np

    task = tiny.task(lr=np.float64(1e-3), img_size=(np.int64(16), 16))
    assert type(task.hparams["lr"]) is float
    assert task.hparams["img_size"] == [16, 16]
    assert isinstance(task, Classification)
