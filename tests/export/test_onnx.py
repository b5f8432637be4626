"""Export: what is in the file, that it equals torch, and what is left when something fails."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import zoo.export
from zoo.attention import create_attention, list_attentions
from zoo.errors import UsageError
from zoo.export import ExportError, to_onnx

from .conftest import CLASSES, TinyTask

# float32 sums in another order; logits here are of size 1 to 10, and the deepest network tested has 12 blocks.
NOISE = {"rtol": 1e-4, "atol": 1e-4}


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("batch", [1, 2, 5, 17])
def test_equals_a_float64_network_at_any_batch(model, task, batch):
    images = noise(batch, 3, 32, 32)
    exact = copy.deepcopy(task.backbone).double()((torch.from_numpy(images).double() / 255 - 0.4) / 0.3)
    np.testing.assert_allclose(run(model, images), exact.detach().numpy(), **NOISE)


def test_interface_of_the_graph(model):
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["batch", len(CLASSES)])


def test_metadata_says_what_running_takes(model):
    entries = metadata(model)
    assert json.loads(entries["zoo.class_names"]) == CLASSES
    assert json.loads(entries["zoo.img_size"]) == [32, 32]
    assert json.loads(entries["zoo.versions"])["torch"] == torch.__version__
    expected = {"task": "classification", "in_chans": "3", "backbone": "test_vit", "crop_mode": "center", "format": "1"}
    expected |= {"crop_pct": "0.9", "interpolation": "bicubic"}
    assert {name: entries[f"zoo.{name}"] for name in expected} == expected
    assert 0 <= float(entries["zoo.max_relative_error"]) < 1e-4


def test_defaults_of_preprocessing_are_timms(tmp_path, small):
    to_onnx(small, tmp_path / "m.onnx", preprocess={"interpolation": "random", "crop_pct": None})
    entries = metadata(tmp_path / "m.onnx")
    # transforms_imagenet_eval's own defaults; a random filter is for training alone.
    assert (entries["zoo.crop_pct"], entries["zoo.crop_mode"], entries["zoo.interpolation"]) == (
        str(timm.data.constants.DEFAULT_CROP_PCT),
        "center",
        "bilinear",
    )


def test_file_names_no_place_on_this_machine(model):
    content = model.read_bytes()
    for place in (timm.__file__, torch.__file__, zoo.export.__file__, str(model.parent)):
        assert os.path.dirname(place).encode() not in content


def test_twice_the_same_bytes(tmp_path, task, model):
    to_onnx(task, tmp_path / "again.onnx", preprocess={"crop_pct": 0.9, "interpolation": "bicubic"})
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()


def test_the_task_is_left_as_it_was(tmp_path):
    task = TinyTask().train()
    task._trainer = lambda: None  # a lambda cannot be pickled; a trainer should not be
    before = copy.deepcopy(task.state_dict())
    to_onnx(task, tmp_path / "m.onnx")
    assert task.training
    assert task._trainer is not None
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_vit", {"in_chans": 1}),
        ("test_vit", {"img_size": (32, 64), "dynamic_img_size": True}),
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("test_efficientnet", {}),
    ],
)
def test_other_networks_and_inputs(tmp_path, backbone, options):
    torch.manual_seed(0)
    dynamic = {k: v for k, v in options.items() if k == "dynamic_img_size"}
    size, in_chans = options.get("img_size", (32, 32)), options.get("in_chans", 3)
    task = TinyTask(backbone, size, in_chans, **dynamic)
    result = to_onnx(task, tmp_path / "m.onnx")
    images = noise(4, in_chans, *size)
    with torch.no_grad():
        expected = task.inference(torch.from_numpy(images))
    np.testing.assert_allclose(run(result.path, images), expected.numpy(), **NOISE)
    assert result.size_bytes == result.path.stat().st_size
    assert result.images == 12
    assert f"{result.max_error:.1e}" in str(result)


class OneAttention(nn.Module):
    """One mechanism on a map of 4 x 6 positions, as a network lives with it."""

    def __init__(self, name):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, stride=8)
        self.attention = create_attention(name, 24, layout="map", grid_size=(4, 6))
        self.head = nn.Linear(self.attention.dim_out, len(CLASSES))

    def forward(self, x):
        # The signs keep a mechanism apart from its mirror image, which a plain mean over positions would not.
        x = self.attention(self.stem(x)).flatten(2)
        return self.head((x * torch.linspace(-1, 2, x.shape[-1])).mean(2))


@pytest.mark.parametrize("name", list_attentions())
def test_every_attention_exports(tmp_path, name):
    torch.manual_seed(0)
    task = TinyTask(img_size=(32, 48))
    task.backbone = OneAttention(name).eval()
    result = to_onnx(task, tmp_path / "m.onnx")
    images = noise(3, 3, 32, 48)
    with torch.no_grad():
        expected = copy.deepcopy(task.backbone).double()((torch.from_numpy(images).double() / 255 - 0.4) / 0.3)
    np.testing.assert_allclose(run(result.path, images), expected.numpy(), **NOISE)


def test_blocks_that_share_a_map_export(tmp_path):
    options = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    task = TinyTask("zoo_vit_tiny_patch16_224", (32, 48), attn_share=[[1, 2]], **options)
    result = to_onnx(task, tmp_path / "m.onnx")
    images = noise(3, 3, 32, 48)
    with torch.no_grad():
        expected = task.inference(torch.from_numpy(images))
    np.testing.assert_allclose(run(result.path, images), expected.numpy(), **NOISE)


class Folding(nn.Module):
    """Two branches that `fuse` folds into one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, len(CLASSES), 1), nn.Conv2d(3, len(CLASSES), 1)

    def forward(self, x):
        return (self.a(x) + self.b(x) if self.b is not None else self.a(x)).mean((2, 3))

    def fuse(self):
        with torch.no_grad():
            self.a.weight += self.b.weight
            self.a.bias += self.b.bias
        self.b = None


def test_fuse_is_called_on_a_copy(tmp_path):
    task = TinyTask()
    task.backbone = Folding()
    to_onnx(task, tmp_path / "m.onnx")
    assert task.backbone.b is not None
    convolutions = [node for node in onnx.load(str(tmp_path / "m.onnx")).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = task.inference(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", images), expected, **NOISE)


class WronglyFolding(Folding):
    def fuse(self):
        super().fuse()
        self.a.weight.data.mul_(1.01)


def test_a_fuse_that_changes_the_network_is_caught(tmp_path):
    task = TinyTask()
    task.backbone = WronglyFolding()
    with pytest.raises(ExportError, match="onnxruntime and torch differ by"):
        to_onnx(task, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Different(TinyTask):
    """Computes something else under export than in eager mode, as a wrongly translated operator would."""

    def inference(self, images):
        logits = super().inference(images)
        return logits * 1.001 if torch.compiler.is_exporting() else logits


class NotExportable(TinyTask):
    def inference(self, images):
        return super().inference(images) if images.float().mean().item() > 3 else super().inference(images) + 1


class FixedBatch(TinyTask):
    def inference(self, images):
        return super().inference(images.reshape(2, 3, 32, 32) if torch.compiler.is_exporting() else images)


class Damaged(TinyTask):
    def __init__(self):
        super().__init__()
        self.backbone[-1].bias.data[2] = float("nan")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Different, r"onnxruntime and torch differ by .* on a batch of 1"),
        (NotExportable, "cannot be exported to ONNX"),
        (FixedBatch, "batch"),
        (Damaged, "NaN or infinite"),
    ],
)
def test_failure_leaves_no_file_and_keeps_the_old_one(tmp_path, kind, message):
    old = tmp_path / "m.onnx"
    old.write_bytes(b"the model of yesterday")
    with pytest.raises(ExportError, match=message) as caught:
        to_onnx(kind(), old)
    assert len(str(caught.value)) < 600
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"the model of yesterday")]


def test_tolerance_is_used(tmp_path, small):
    with pytest.raises(ExportError, match="more than the 1e-12 allowed"):
        to_onnx(small, tmp_path / "m.onnx", tolerance=1e-12)


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.export.conftest import TinyTask; from zoo.export import to_onnx\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
        "try: to_onnx(TinyTask(), sys.argv[1])\n"
        "except OSError as error: print('OSError:', error)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [sys.executable, "-c", program, str(tmp_path / "m.onnx"), root]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("OSError:"), done.stderr
    assert "could not be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/m.onnx", "does not exist: make it"),
        ("model", r"ends in \.onnx, for instance .*model\.onnx"),
        ("", r"ends in \.onnx, for instance .*model\.onnx"),
    ],
)
def test_bad_target(tmp_path, small, name, message):
    with pytest.raises(UsageError, match=message):
        to_onnx(small, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not os.path.isdir("/sys/kernel"),
    reason="needs a folder that even root cannot write to: /sys, which Linux alone has",
)
def test_folder_that_cannot_be_written_to(small):
    with pytest.raises(UsageError, match="/sys/kernel cannot be written to"):
        to_onnx(small, "/sys/kernel/m.onnx")


def test_bad_options(tmp_path, small):
    with pytest.raises(UsageError, match=r"'crop'.*'crop_\w+'"):
        to_onnx(small, tmp_path / "m.onnx", preprocess={"crop": 1})
    with pytest.raises(UsageError, match="bicubic"):
        to_onnx(small, tmp_path / "m.onnx", preprocess={"interpolation": "bicubik"})
    with pytest.raises(UsageError, match=r"crop_pct=1\.5"):
        to_onnx(small, tmp_path / "m.onnx", preprocess={"crop_pct": 1.5})
    with pytest.raises(UsageError, match="center"):
        to_onnx(small, tmp_path / "m.onnx", preprocess={"crop_mode": "centre"})
    with pytest.raises(UsageError, match="a Linear cannot be exported"):
        to_onnx(nn.Linear(1, 1), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_extra(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"onnxscript.*attnzoo\[export\]"):
        to_onnx(small, tmp_path / "m.onnx")


def test_export_is_silent(tmp_path, small, capfd, recwarn):
    to_onnx(small, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
