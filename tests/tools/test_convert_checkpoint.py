"""A weights file with foreign objects becomes safetensors, and only on explicit trust."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def weights():
    return {"a.weight": torch.randn(2, 3), "a.count": torch.tensor(3), "half": torch.randn(2).bfloat16()}


def same(path, weights):
    loaded = load_file(path)
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_without_trust_nothing_is_opened(tmp_path, weights, capsys):
    torch.save({"model": weights, "args": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    assert convert.main([str(tmp_path / "w.pth")]) == 2
    assert "--trust" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 0
    assert (tmp_path / "ran").exists(), "the trap does not work, so the lines above prove nothing"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "state_dict_ema", ""])
def test_writes_the_tensors_and_says_so(tmp_path, weights, capsys, key):
    content = {key: weights, "args": argparse.Namespace(lr=1)} if key else {**weights, "args": argparse.Namespace()}
    torch.save(content, tmp_path / "w.pth")
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 0
    assert same(tmp_path / "w.safetensors", weights)
    said = capsys.readouterr().out
    assert "w.safetensors" in said
    assert "3 tensors, 9 values" in said
    assert (f"'{key}'" in said) == bool(key)


def test_key_and_output_are_taken(tmp_path, weights):
    torch.save({"model": {"x": torch.zeros(1)}, "model_ema": weights}, tmp_path / "w.pth")
    assert (
        convert.main([str(tmp_path / "w.pth"), "--trust", "--key", "model_ema", "--output", str(tmp_path / "o")]) == 0
    )
    assert same(tmp_path / "o", weights)


def test_pickled_modules_and_tied_weights(tmp_path):
    layer = torch.nn.Linear(2, 2, bias=False)
    tied = torch.nn.ModuleDict({"a": layer, "b": layer})
    torch.save({"model": tied}, tmp_path / "w.pth")
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 0
    assert same(tmp_path / "w.safetensors", {"a.weight": layer.weight, "b.weight": layer.weight})


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([1, 2], [], "list"),
        ({"args": 3}, [], "--key"),
        ({"model": {"w": torch.zeros(1)}}, ["--key", "ema"], "'ema'"),
    ],
)
def test_useless_files_are_refused(tmp_path, capsys, content, options, message):
    torch.save(content, tmp_path / "w.pth")
    assert convert.main([str(tmp_path / "w.pth"), "--trust", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


def test_missing_garbage_and_present_files(tmp_path, weights, capsys):
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 2
    assert "not there" in capsys.readouterr().err
    (tmp_path / "w.pth").write_bytes(b"no weights")
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 2
    torch.save(weights, tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_text("mine")
    assert convert.main([str(tmp_path / "w.pth"), "--trust"]) == 2
    assert (tmp_path / "w.safetensors").read_text() == "mine"


def test_as_a_command(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pth")
    done = subprocess.run([sys.executable, TOOL, tmp_path / "w.pth"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--trust" in done.stderr


def test_weights_are_looked_for_where_the_backbones_look():
    from zoo.backbones import CHECKPOINT_KEYS

    assert convert.KEYS == CHECKPOINT_KEYS
