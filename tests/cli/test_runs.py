"""A run from the first command to the last: its folder, config and curves, resuming, testing, export."""

import csv
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from zoo.commands import runs
from zoo.commands.loggers import RunCSVLogger
from zoo.errors import UsageError


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_holds_what_a_person_looks_for(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "record.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "pictures/confusion_matrix.png",
        "pictures/worst_mistakes.png",
    } <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    record = json.loads((finished / "record.json").read_text())
    assert record["steps"] == 6
    assert record["val"]["images"] == 12
    assert [int(row["step"]) for row in rows(finished) if row["val/top1"]] == [2, 5]


def test_saved_config_makes_the_same_run_again(zoo, finished, tmp_path):
    done = zoo("fit", "--config", str(finished / "config.yaml"), "--run", "again")
    assert done.status == 0, done.err
    expected, got = weights(finished), weights(tmp_path / "runs" / "again")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(
    "line",
    [
        ["fit", "--config", "RECIPE", "--model.lr", "0.25"],
        ["--config", "RECIPE", "fit", "--model.lr", "0.25"],
        ["fit", "--model.lr=0.25", "--config=RECIPE"],
        ["--config=RECIPE", "fit", "--model.lr", "0.5", "--model.lr", "0.25"],
    ],
    ids=" ".join,
)
def test_recipe_anywhere_and_overrides_win(zoo, recipe, line):
    shown = zoo(*[part.replace("RECIPE", recipe) for part in line], "--print_config")
    assert shown.status == 0, shown.err
    assert yaml.safe_load(shown.out)["model"]["init_args"]["lr"] == 0.25


def test_later_recipes_win(zoo, recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("model:\n  init_args: {lr: 0.125}\ntrainer: {max_epochs: 7}\n")
    shown = yaml.safe_load(zoo("fit", "--config", recipe, "--config", "more.yaml", "--print_config").out)
    assert shown["model"]["init_args"]["lr"] == 0.125
    assert shown["trainer"]["max_epochs"] == 7
    assert shown["model"]["init_args"]["backbone_options"]["depth"] == 1


def test_quickstart_is_found_by_name_with_its_overrides(zoo, images):
    line = ["--model.backbone", "zoo_vit_small_patch16_224", "--model.attn", "uniform", "--data.root", str(images)]
    shown = zoo("fit", "--config", "quickstart", *line, "--print_config")
    content = yaml.safe_load(shown.out)
    assert content["model"]["init_args"]["backbone"] == "zoo_vit_small_patch16_224"
    assert content["model"]["init_args"]["attn"] == "uniform"
    assert content["data"]["init_args"]["root"] == str(images)


def test_one_seed_decides_everything(zoo, recipe, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert zoo("fit", "--config", recipe, "--run", name, "--seed_everything", seed).status == 0
    a, b, c = (weights(tmp_path / "runs" / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.head.weight"], c["backbone.head.weight"])
    data = torch.load(tmp_path / "runs" / "c" / "checkpoints" / "last.ckpt", weights_only=True)
    assert data["datamodule_hyper_parameters"]["seed"] == 6


def test_closing_lines_say_what_to_type_next(zoo, recipe, tmp_path):
    done = zoo("fit", "--config", recipe, "--run", "x")
    assert done.status == 0
    for line in (
        "zoo export x model.onnx",
        "zoo predict x IMAGES...",
        "zoo test --run x",
        "runs/x: 2 epochs, 6 updates",
    ):
        assert line in done.out
    record = json.loads((tmp_path / "runs" / "x" / "record.json").read_text())
    assert f"last {record['val']['top1']:.2%}" in done.out


def test_run_without_a_name_gets_a_readable_one(zoo, recipe, tmp_path):
    assert zoo("fit", "--config", recipe).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("_tiny")
    assert run.name[:2] == "20"


def test_resume_goes_on_where_the_run_stopped(zoo, finished, tmp_path):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    # A line of a step that the checkpoint does not know, as a killed run leaves it.
    with open(run / "metrics.csv", "a") as file:
        file.write(",".join("6" if name == "step" else "" for name in rows(finished)[0]) + "\n")
    done = zoo("fit", "--run", "x", "--resume", "--trainer.max_epochs", "4")
    assert done.status == 0, done.err
    assert "after 6 updates" in done.out
    assert [int(row["step"]) for row in rows(run) if row["val/top1"]] == [2, 5, 8, 11]
    assert rows(run)[: len(rows(finished))] == rows(finished)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 4


def test_resume_passes_over_a_damaged_checkpoint(zoo, finished, tmp_path):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    done = zoo("fit", "--run", "x", "--resume", "--trainer.max_epochs", "3")
    assert done.status == 0, done.err
    assert f"{os.path.join('runs', 'x', 'checkpoints', 'last.ckpt')} is passed over" in done.err
    assert "resuming from runs/x/checkpoints/best.ckpt" in done.out
    assert weights(run)


def test_resume_of_a_run_that_is_done_trains_nothing(zoo, finished, tmp_path):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    done = zoo("fit", "--run", "x", "--resume")
    assert done.status == 0
    assert "trained to its end already" in done.out
    assert all(torch.equal(value, weights(run)[key]) for key, value in weights(finished).items())
    assert (run / "record.json").read_text() == (finished / "record.json").read_text()


def test_resume_of_a_run_that_the_clock_ended_asks_for_time(zoo, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs" / "x")
    line = ["fit", "--run", "x", "--resume", "--trainer.max_epochs", "3"]
    ended = zoo(*line, "--trainer.max_time", "00:00:00:00")
    assert "trained to its end already" in ended.out, ended.err
    assert "--resume --trainer.max_time DD:HH:MM:SS" in ended.out
    further = zoo(*line, "--trainer.max_time", "00:01:00:00")
    assert "runs/x: 3 epochs, 9 updates" in further.out, further.err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model.lr", "0.5", "is to go on with 0.5: the optimizer goes on as the checkpoint holds it"),
        ("--model.optimizer", "sgd", "is to go on with sgd: the optimizer goes on as the checkpoint holds it"),
        ("--data.val_split", "0.5", "is to go on with 0.5: its validation stands on it"),
    ],
)
def test_resume_with_what_the_checkpoint_decides_is_refused(zoo, finished, tmp_path, option, value, said):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    done = zoo("fit", "--run", "x", "--resume", "--trainer.max_epochs", "3", option, value)
    assert done.status == 2
    assert f"the run was trained with {option}" in done.err
    assert said in done.err
    assert (run / "config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_a_run_that_was_moved_keeps_its_best_checkpoint(zoo, finished, tmp_path):
    run = tmp_path / "elsewhere"
    shutil.copytree(finished, run)
    last, best = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = [state for key, state in content["callbacks"].items() if "'val/top1'" in key]
    # A score that no epoch reaches, so that the best one stays what it is.
    state["best_model_score"] = state["kth_value"] = torch.tensor(2.0)
    state["best_k_models"] = {path: torch.tensor(2.0) for path in state["best_k_models"]}
    torch.save(content, last)
    before = best.read_bytes()
    done = zoo("fit", "--run", str(run), "--resume", "--trainer.max_epochs", "3")
    assert done.status == 0, done.err
    assert "9 updates" in done.out
    assert "dirpath has changed" not in done.err
    assert best.read_bytes() == before


def test_a_run_may_be_called_as_the_folder_of_its_images(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "parts")
    (tmp_path / "parts" / "train").mkdir(parents=True)
    assert str(runs.find_checkpoint("parts")) == "runs/parts/checkpoints/best.ckpt"
    # A path with checkpoints stays what it was.
    (tmp_path / "parts" / "best.ckpt").touch()
    assert str(runs.find_checkpoint("parts")) == "parts/best.ckpt"


def test_validate_and_test_agree_with_the_record(zoo, finished, tmp_path):
    run = tmp_path / "runs" / "x"
    shutil.copytree(finished, run)
    best = max(float(row["val/top1"]) for row in rows(run) if row["val/top1"])
    for line in (["validate", "--run", "x"], ["test", "--run", "x"], ["test", "--ckpt", "runs/x"]):
        done = zoo(*line)
        assert done.status == 0, done.err
        assert f"top-1 {best:.2%}" in done.out
    # The test split is the folder that validation uses, so the accuracy is the same.
    record = json.loads((run / "record.json").read_text())
    assert record["test"]["images"] == 12
    assert record["test"]["top1"] == pytest.approx(best, abs=1e-6)


def test_checkpoint_alone_knows_its_network_and_data(zoo, finished, tmp_path):
    shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path / "model.ckpt")
    done = zoo("validate", "--ckpt", "model.ckpt", "--data.batch_size", "5")
    assert done.status == 0, done.err
    last = [float(row["val/top1"]) for row in rows(finished) if row["val/top1"]][-1]
    assert f"top-1 {last:.2%}" in done.out


def test_export_and_predict(zoo, finished, images, tmp_path):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    done = zoo("export", str(finished), "model.onnx", "--bundle", "kit")
    assert done.status == 0, done.err
    assert (tmp_path / "model.onnx").is_file()
    assert {"model.onnx", "predictor.py", "requirements.txt"} <= {path.name for path in (tmp_path / "kit").iterdir()}
    picture = str(images / "val" / "dark" / "0.png")
    answers = [zoo("predict", model, picture, "--out", "o") for model in ("model.onnx", str(finished))]
    assert [answer.status for answer in answers] == [0, 0]
    assert answers[0].out == answers[1].out
    assert any(name in answers[0].out for name in ("dark", "light", "striped"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "list", "info"])
def test_every_command_explains_itself(zoo, command):
    shown = zoo(command, "--help")
    assert shown.status == 0
    assert f"zoo {command}" in shown.out
    assert shown.err == ""


def test_without_a_command(zoo):
    assert "zoo fit --config quickstart" in zoo().out
    assert zoo("--version").out.startswith("attnzoo ")


def test_probe_leaves_nothing(tmp_path):
    runs.probe(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_probe_of_a_disk_that_fills_while_it_is_tried(tmp_path, monkeypatch):
    from pathlib import Path

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="the disk is full"):
        runs.probe(tmp_path / "a")


def test_furthest_checkpoint_is_resumed_and_last_wins_a_tie(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in (("best", 4), ("last", 4), ("old", 2)):
        torch.save({"global_step": step}, folder / f"{name}.ckpt")
    assert runs.checkpoint_to_resume(tmp_path) == (folder / "last.ckpt", 4)
    torch.save({"global_step": 9}, folder / "best.ckpt")
    assert runs.checkpoint_to_resume(tmp_path) == (folder / "best.ckpt", 9)


def test_find_checkpoint_prefers_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last", "best", "epoch=1"):
        torch.save({}, folder / f"{name}.ckpt")
    assert runs.find_checkpoint(str(tmp_path)).name == "best.ckpt"
    assert runs.find_checkpoint(str(folder)).name == "best.ckpt"
    assert runs.find_checkpoint(str(folder / "last.ckpt")).name == "last.ckpt"


def test_rows_before_the_resumed_step_are_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,loss\n1,3.0\n3,2.0\n5,1.0\n")
    logger = RunCSVLogger(tmp_path / "run", resumed_at=4)
    logger.log_metrics({"loss": 0.5, "acc": 0.25}, step=4)
    logger.save()
    kept = rows(tmp_path / "run")
    assert [(row["step"], row["loss"], row["acc"]) for row in kept] == [
        ("1", "3.0", ""),
        ("3", "2.0", ""),
        ("4", "0.5", "0.25"),
    ]


def test_children_of_other_devices_join_the_run(zoo, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_RUN_FOLDER", str(tmp_path / "parent"))
    assert zoo("fit", "--config", recipe, "--trainer.max_epochs", "1").status == 0
    assert (tmp_path / "parent" / "checkpoints" / "last.ckpt").is_file()
    assert not (tmp_path / "runs").exists()


def test_terminal_and_pipe_get_their_own_tables(capsys, monkeypatch):
    from zoo.commands import tables

    tables.show(("name", "size"), [("a", "1"), ("longer", "22")])
    assert capsys.readouterr().out == "name    size\na       1\nlonger  22\n"
    shown = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True, write=shown.append, flush=lambda: None))
    tables.show(("name", "size"), [("a", "1")])
    assert "name" in "".join(shown)


def test_probabilities_of_predict_are_those_of_the_network(zoo, finished, images, tmp_path):
    from PIL import Image
    from timm.data import create_transform

    from zoo.tasks import load_task

    done = zoo("predict", str(finished), str(images / "val" / "striped" / "1.png"), "--out", "o", "--top", "3")
    assert done.status == 0
    with open(tmp_path / "o" / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    task, _ = load_task(finished / "checkpoints" / "best.ckpt")
    transform = create_transform((3, 16, 16), is_training=False, normalize=False, interpolation="bicubic")
    image = transform(Image.open(images / "val" / "striped" / "1.png").convert("RGB"))
    with torch.no_grad():
        expected = task.inference(image[None])[0].double().softmax(-1)
    assert row["label"] == task.class_names[int(expected.argmax())]
    # The CSV holds rounded numbers.
    np.testing.assert_allclose(float(row["probability"]), float(expected.max()), atol=1e-4)
