"""`zoo fit --resume` after kill -9: the command, the real data module, two workers, and everything random at once."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number, name in enumerate(("dots", "plain", "stripes")):
            target = folder / split / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 80, (24, 24, 3)).astype("uint8")
                pixels[:: (99, 24, 6)[number]] += 150
                Image.fromarray(pixels).save(target / f"{index}.jpg")
    return folder


def recipe(folder: Path, images: Path, die: bool) -> Path:
    content = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    content["trainer"] |= {
        "max_epochs": 3,
        "check_val_every_n_epoch": 1,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}},
            {"class_path": "zoo.tasks.callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}},
        ],
    }
    if die:
        arguments = {"batches": 9, "marker": str(folder / "died")}
        content["trainer"]["callbacks"].append({"class_path": "tiny_run.Die", "init_args": arguments})
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2}
    content["model"]["init_args"]["backbone_options"] = options
    content["data"]["init_args"] |= {"root": str(images), "img_size": 16, "batch_size": 8, "num_workers": 2}
    content["data"]["init_args"] |= {"mixup": 0.2, "cutmix": 1.0, "color_jitter": 0.4, "re_prob": 0.3}
    path = folder / ("die.yaml" if die else "live.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def zoo(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'tasks'}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": str(folder)}
    command = [sys.executable, "-m", "zoo.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def validations(path: Path) -> list[tuple[str, str, str]]:
    with open(path, newline="") as file:
        return [(r["step"], r["val/top1"], r["val/loss"]) for r in csv.DictReader(file) if r["val/top1"]]


# Two minutes of three processes; test_resume.py looks at the same without the command line.
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path, images):
    whole = zoo(tmp_path, "fit", "--config", str(recipe(tmp_path, images, die=False)), "--run", "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = zoo(tmp_path, "fit", "--config", str(recipe(tmp_path, images, die=True)), "--run", "cut")
    assert killed.returncode == -9, killed.stderr[-2000:]
    runs = tmp_path / "runs"
    # 6 updates an epoch: killed at the tenth batch, in the middle of the second.
    assert torch.load(runs / "cut" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    resumed = zoo(tmp_path, "fit", "--run", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    ends = [torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert [end["global_step"] for end in ends] == [18, 18]
    for part in ("state_dict", "current_model_state"):
        expected, got = (end[part] for end in ends)
        different = [key for key in expected if not torch.equal(expected[key], got[key])]
        assert not different, f"{part}: {len(different)} of {len(expected)} differ, first {different[:3]}"
    assert not torch.equal(
        ends[0]["state_dict"]["backbone.head.weight"], ends[0]["current_model_state"]["backbone.head.weight"]
    )
    # Every epoch is validated and logged once, with the same figures.
    curves = [validations(runs / name / "metrics.csv") for name in ("whole", "cut")]
    assert [step for step, _, _ in curves[0]] == ["5", "11", "17"]
    assert curves[0] == curves[1]
    again = zoo(tmp_path, "fit", "--run", "nothing", "--resume")
    assert again.returncode == 2
    assert "nothing" in again.stderr
