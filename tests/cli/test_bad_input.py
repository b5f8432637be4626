"""Wrong input: one plain sentence on stderr that names what was given and what to do, and the exit status."""

import errno
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from .conftest import draw, settings

ROOT = Path(__file__).resolve().parents[2]


def refused(result, *words, status=2):
    """The exit status, one line that starts with "error: " and holds all words, and no traceback."""
    assert result.status == status, result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert "Traceback" not in result.err + result.out
    # A sentence, not a page.
    assert len(lines[0]) < 700


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["fitt"], ["unknown command 'fitt'", "'fit'"]),
        (["--foo"], ["which command?", "fit", "predict"]),
        (["fit"], ["give a recipe", "zoo list recipes"]),
        (["fit", "--config", "quikstart"], ["unknown recipe 'quikstart'", "'quickstart'"]),
        (["fit", "--config", "no/such.yaml"], ["no/such.yaml", "quickstart"]),
        (["fit", "--config"], ["--config", "expected one argument"]),
        (["fit", "--config", "compare/cifar10_attention"], ["zoo compare --config compare/cifar10_attention"]),
        (["compare", "--config", "quickstart"], ["quickstart", "zoo fit", "compare/cifar10_attention"]),
        (["list", "bakbones"], ["'bakbones'", "'backbones'"]),
        (["list", "backbones", "zoo_vitt*"], ["zoo_vitt*", "zoo list backbones"]),
        (["list", "--fo"], ["--fo"]),
        (["info"], ["name"]),
        (["info", "zoo_vit_tiny_patch16_225"], ["'zoo_vit_tiny_patch16_224'"]),
        (["info", "sofmax"], ["'softmax'"]),
        (["test"], ["--run NAME", "--ckpt"]),
        (["test", "--run", "nothing"], ["nothing"]),
        (["validate", "--ckpt", "nothing.ckpt"], ["nothing.ckpt"]),
        (["fit", "--resume"], ["--run NAME --resume"]),
        (["fit", "--run", "nothing", "--resume"], ["nothing to resume", "nothing"]),
        (["export", "nothing", "model.onnx"], ["nothing"]),
        (["export", "nothing"], ["zoo export nothing model.onnx"]),
        (["export"], ["RUN_OR_CKPT"]),
        (["predict", "nothing", "a.png"], ["nothing"]),
        (["predict", "nothing.onnx", "a.png"], ["nothing.onnx"]),
    ],
    ids=" ".join,
)
def test_wrong_words(zoo, line, words):
    refused(zoo(*line), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.bakbone", "x"], ["unknown option --model.bakbone", "--model.backbone"]),
        (["--data.rot", "x"], ["unknown option --data.rot", "--data.root"]),
        (["--trainer.max_epocs", "3"], ["unknown option --trainer.max_epocs", "--trainer.max_epochs"]),
        (["--modell.lr", "3"], ["'modell'", "'model'"]),
        (["--foo", "3"], ["unknown option --foo", "--model."]),
        (["extra"], ["unexpected 'extra'"]),
        (["--model.lr", "abc"], ["--model.lr takes a number, not 'abc'"]),
        (["--data.batch_size", "x"], ["--data.batch_size takes a whole number, not 'x'"]),
        (["--trainer.max_epochs", "x"], ["--trainer.max_epochs takes a whole number, not 'x'"]),
        (["--trainer.precision", "7"], ["--trainer.precision takes one of", "'bf16-mixed'"]),
        (["--trainer.accelerator", "gpus"], ["gpus", "cpu"]),
        (["--trainer.max_time", "x"], ["'x'", "DD:HH:MM:SS"]),
        (["--model.backbone"], ["--model.backbone needs a value"]),
        (["--model.backbone_options", "3"], ["--model.backbone_options takes a mapping"]),
        (["--model", "zoo.tasks.Clasification"], ["'zoo.tasks.Clasification'", "zoo.tasks.Classification"]),
        (["--model.img_size", "32"], ["model.img_size", "--data.img_size"]),
        (["--seed_everything", "-7"], ["--seed_everything -7", "between 0 and 4294967295"]),
        (["--data.seed", "32"], ["data.seed", "--seed_everything"]),
        (["--model.backbone", "zoo_vit_tinny_patch16_224"], ["zoo_vit_tinny", "'zoo_vit_tiny_patch16_224'"]),
        (["--model.attn", "unifrom"], ["unknown attention 'unifrom'", "'uniform'"]),
        (["--model.attn", "uniform", "--model.attn_options", "{qkv_bia: true}"], ["qkv_bia", "uniform"]),
        (["--model.optimizer", "adamm"], ["unknown optimizer 'adamm'", "'adam'"]),
        (["--data.img_size", "0"], ["img_size"]),
        (["--data.batch_size", "0"], ["batch_size"]),
        (["--data.on_error", "ignore"], ["ignore", "skip", "raise"]),
        (["--data.root", "no/such/folder"], ["no/such/folder"]),
        (["--data.train_split", "trian"], ["trian", "train"]),
        (["--model.pretrained", "no/such/weights.pth"], ["no/such/weights.pth"]),
    ],
    ids=" ".join,
)
def test_wrong_overrides_leave_no_run_behind(zoo, recipe, tmp_path, overrides, words):
    refused(zoo("fit", "--config", recipe, "--run", "x", *overrides), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", ["is no valid YAML, line 1"]),
        ("3", ["is no recipe"]),
        ("", ["is no recipe"]),
        ("model:\n  init_args:\n    bakbone: 3\n", ["--model.bakbone", "--model.backbone"]),
        ("modl:\n  init_args: {lr: 3}\n", ["'modl'", "'model'"]),
        ("trainer:\n  max_epochs: many\n", ["--trainer.max_epochs takes a whole number, not 'many'"]),
    ],
)
def test_wrong_recipe(zoo, recipe, tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    refused(zoo("fit", "--config", recipe, "--config", "bad.yaml", "--run", "x"), *words)


def test_recipe_without_data(zoo, tmp_path, images):
    only = settings(images)
    del only["data"]
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(only))
    refused(zoo("fit", "--config", "half.yaml"), "there is no data")


def test_empty_folder_of_images(zoo, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(zoo("fit", "--config", recipe, "--run", "x", "--data.root", "empty"), "empty")


def test_class_that_train_does_not_have(zoo, recipe, tmp_path):
    draw(tmp_path / "own")
    shutil.copytree(tmp_path / "own" / "val" / "dark", tmp_path / "own" / "val" / "unheard_of")
    refused(zoo("fit", "--config", recipe, "--run", "x", "--data.root", "own"), "unheard_of")


def test_corrupt_image_is_named_and_counted_or_stops(zoo, recipe, tmp_path):
    draw(tmp_path / "own")
    bad = tmp_path / "own" / "train" / "dark" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    done = zoo("fit", "--config", recipe, "--run", "x", "--data.root", "own")
    assert done.status == 0
    assert (tmp_path / "runs" / "x" / "skipped.csv").read_text().count("3.png") == 1
    stopped = zoo("fit", "--config", recipe, "--run", "y", "--data.root", "own", "--data.on_error", "raise")
    assert stopped.status in (1, 2)
    assert "3.png" in stopped.err.splitlines()[-1]
    assert "Traceback" not in stopped.err
    workers = ["--data.num_workers", "1", "--data.on_error", "raise"]
    from_worker = zoo("fit", "--config", recipe, "--run", "z", "--data.root", "own", *workers)
    assert "3.png" in from_worker.err.splitlines()[-1]
    assert "Traceback" not in from_worker.err


def test_folder_that_cannot_be_written(zoo, recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(zoo("fit", "--config", recipe, "--run", "file/x"), "file/x", "cannot be written", "--run")


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"),
    reason="needs a folder that even root cannot write to: /proc, which Linux alone has",
)
def test_read_only_folder(zoo, recipe):
    refused(zoo("fit", "--config", recipe, "--run", "/proc/zoo/x"), "/proc/zoo/x", "cannot be written")


def test_full_disk_before_training(zoo, recipe, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    refused(zoo("fit", "--config", recipe, "--run", "x"), "disk", "full", "1 MiB")


def test_full_disk_in_the_middle_of_a_run(zoo, recipe, tmp_path, monkeypatch):
    from zoo.tasks import AtomicCheckpointIO

    assert zoo("fit", "--config", recipe, "--run", "x", "--trainer.max_epochs", "1").status == 0
    before = (tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt").read_bytes()

    def full(self, checkpoint, path, storage_options=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    result = zoo("fit", "--run", "x", "--resume", "--trainer.max_epochs", "3")
    assert result.status == 1
    message = result.err.splitlines()[-1]
    assert "the disk is full" in message
    assert "zoo fit --run x --resume" in message
    assert (tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt").read_bytes() == before


def test_writer_thread_on_a_full_disk_shows_no_traceback(capsys, monkeypatch):
    from zoo.commands.quiet import quiet

    def fails(error):
        raise error

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with warnings.catch_warnings():
        quiet()
    for error, words in ((OSError(errno.ENOSPC, "full"), ""), (ValueError("a bug"), "a bug")):
        thread = threading.Thread(target=fails, args=(error,))
        thread.start()
        thread.join()
        assert words in (err := capsys.readouterr().err)
        assert bool(words) == bool(err)


def test_loss_that_is_no_number(zoo, recipe, tmp_path):
    result = zoo("fit", "--config", recipe, "--run", "x", "--model.lr", "1e30", "--model.optimizer", "sgd")
    assert result.status == 1
    message = result.err.splitlines()[-1]
    assert "NaN or infinite at step" in message
    assert "Traceback" not in result.err


def test_ctrl_c_says_how_to_go_on(zoo, recipe, monkeypatch):
    from zoo.tasks import Classification

    step = Classification.training_step

    def interrupted(self, batch, index):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Classification, "training_step", interrupted)
    result = zoo("fit", "--config", recipe, "--run", "x")
    assert result.status == 1
    assert result.err.splitlines()[-1] == "error: stopped by Ctrl-C. Continue with: zoo fit --run x --resume"


def test_a_bug_says_how_to_see_where(zoo, recipe, monkeypatch):
    from zoo.tasks import Classification

    def broken(self, batch, index):
        raise AttributeError("nothing has this")

    monkeypatch.setattr(Classification, "training_step", broken)
    refused(zoo("fit", "--config", recipe, "--run", "x"), "nothing has this", "--debug", status=1)
    assert "in broken" in zoo("fit", "--config", recipe, "--run", "y", "--debug").err
    monkeypatch.setenv("ZOO_DEBUG", "1")
    assert "in broken" in zoo("fit", "--config", recipe, "--run", "z").err


def test_finished_run_is_not_overwritten(zoo, recipe, finished):
    refused(zoo("fit", "--config", recipe, "--run", str(finished)), "already holds a finished run", "--resume")


def test_unfinished_run_is_not_overwritten(zoo, recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs" / "x", ignore=shutil.ignore_patterns("record.json"))
    refused(zoo("fit", "--config", recipe, "--run", "x"), "already holds an unfinished run", "zoo fit --run x --resume")


def test_resume_without_a_readable_checkpoint(zoo, finished, tmp_path):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    result = zoo("fit", "--run", "x", "--resume")
    refused(result, "there is nothing to resume", "x")
    assert result.err.count("is passed over") == 2


def test_resume_with_another_network(zoo, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs" / "x")
    line = ["fit", "--run", "x", "--resume", "--trainer.max_epochs", "3", "--model.backbone", "vit_tiny_patch16_224"]
    refused(zoo(*line), "zoo_vit_tiny_patch16_224", "'vit_tiny_patch16_224'")


def test_checkpoint_of_another_number_of_classes(zoo, finished, tmp_path):
    draw(tmp_path / "own", classes=("dark", "light"))
    refused(zoo("test", "--ckpt", str(finished), "--data.root", "own"), "3 classes", "2")


def test_checkpoint_of_another_data_set(zoo, finished, tmp_path):
    draw(tmp_path / "own", classes=("dark", "light", "spotted"))
    refused(zoo("validate", "--ckpt", str(finished), "--data.root", "own"), "'striped'", "'spotted'")


def test_weights_of_another_network_are_named_with_the_network(zoo, recipe, tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    line = ["fit", "--config", recipe, "--run", "x", "--model.pretrained", "weights.pth"]
    refused(zoo(*line), "weights.pth", "'zoo_vit_tiny_patch16_224'", "layer.weight", "Give the backbone")


def test_weights_that_cannot_be_downloaded(zoo, recipe, tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    options = ["--model.backbone_options", "null", "--data.img_size", "32", "--model.pretrained", "true"]
    result = zoo("fit", "--config", recipe, "--run", "x", *options)
    refused(result, "download failed", "--model.pretrained FILE", status=1)


def test_exported_file_in_place_of_a_checkpoint(zoo, recipe, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    refused(zoo("fit", "--config", recipe, "--run", "x", "--model.pretrained", "model.onnx"), "model.onnx", "best.ckpt")
    refused(zoo("test", "--ckpt", "model.onnx"), "model.onnx", "best.ckpt")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("line", [["test", "--ckpt"], ["export"], ["predict"]], ids=" ".join)
def test_pickle_with_code_is_refused_and_not_run(zoo, tmp_path, line):
    torch.save({"hyper_parameters": Payload()}, tmp_path / "evil.ckpt", pickle_module=pickle)
    after = {"export": ["model.onnx"], "predict": ["a.png"]}.get(line[0], [])
    (tmp_path / "a.png").write_bytes(b"")
    refused(zoo(*line, "evil.ckpt", *after), "evil.ckpt", "refused")
    assert not (tmp_path / "ran").exists()


def test_file_that_is_no_checkpoint(zoo, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    refused(zoo("test", "--ckpt", "weights.pt"), "weights.pt", "no checkpoint of a run")


@pytest.mark.clients
def test_ctrl_c_on_the_real_command(recipe, tmp_path):
    command = [
        sys.executable,
        "-m",
        "zoo.cli",
        "fit",
        "--config",
        recipe,
        "--run",
        "x",
        "--trainer.max_epochs",
        "10000",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what runs behind it deaf to Ctrl-C, and so would be all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "runs" / "x" / "metrics.csv").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == "error: stopped by Ctrl-C. Continue with: zoo fit --run x --resume"
