"""The predictor as a person uses it: results, tables, CSV files, progress, and what it says about bad input."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from zoo.errors import UsageError
from zoo.export import Predictor, PredictorError, bundle
from zoo.export import predictor as room
from zoo.resources import samples_dir

from .conftest import CLASSES


def save(path, seed=0, size=(41, 33)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    # Large patches of colour, so that pictures differ for the network too.
    Image.fromarray(pixels[: size[0] // 8 + 1, : size[1] // 8 + 1]).resize(size[::-1]).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures in class folders; the class is the number modulo the classes."""
    folder = tmp_path / "pictures"
    for number in range(40):
        save(folder / CLASSES[number % len(CLASSES)] / f"{number:02d}.png", seed=number)
    return folder


def probabilities(task, paths):
    """Of torch, through timm's transform: what the predictor has to say."""
    transform = create_transform((3, 32, 32), is_training=False, normalize=False, crop_pct=0.9, interpolation="bicubic")
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return task.inference(batch).double().softmax(-1)


def rows(folder):
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predict_equals_torch(model, task, pictures, batch_size):
    paths = sorted(pictures.rglob("*.png"))
    results = Predictor(model).predict(paths, top=3, batch_size=batch_size)
    expected = probabilities(task, paths)
    values, indices = expected.topk(3)
    for result, value, index in zip(results, values, indices, strict=True):
        assert result.label == CLASSES[index[0]] == result.top[0][0]
        assert [label for label, _ in result.top] == [CLASSES[i] for i in index]
        # Logits agree to 1e-4, and a probability moves at most a quarter as fast as a logit.
        np.testing.assert_allclose([p for _, p in result.top], value, atol=1e-4)
        assert result.probability == result.top[0][1]


def test_same_answers_as_torch_on_the_bundled_samples(model, task):
    folder = samples_dir() / "classification" / "val"
    paths = sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.png"))
    assert len(paths) >= 120
    expected = probabilities(task, paths)
    # Images whose first two classes are closer than the two runtimes' noise could fall either way.
    best = expected.topk(2).values
    clear = (best[:, 0] - best[:, 1] > 1e-4).tolist()
    assert sum(clear) >= len(paths) - 2
    results = Predictor(model).predict(paths)
    answers = [(result.label, CLASSES[row.argmax()]) for result, row in zip(results, expected, strict=True)]
    assert all(ours == theirs for (ours, theirs), sure in zip(answers, clear, strict=True) if sure)


def test_predict_takes_one_image_too(model, pictures):
    predictor, path = Predictor(model), next(pictures.rglob("*.png"))
    (by_path,), (by_image,) = predictor.predict(path), predictor.predict(Image.open(path))
    (by_array,) = predictor.predict(np.asarray(Image.open(path)))
    assert by_path == by_image == by_array
    assert len(by_path.top) == 5
    assert sum(p for _, p in predictor.predict(path, top=99)[0].top) == pytest.approx(1)
    assert predictor.predict([]) == []
    with pytest.raises(PredictorError, match=r"nothing\.png cannot be read"):
        predictor.predict("nothing.png")


def test_command_prints_and_writes(model, task, pictures, tmp_path, capsys):
    out = tmp_path / "deep" / "results"
    assert room.main([str(model), str(pictures), "--out", str(out), "--top", "2", "--batch", "16"]) == 0
    paths = sorted(pictures.rglob("*.png"))
    table = rows(out)
    assert list(table[0]) == ["path", "label", "probability", "label_2", "probability_2"]
    assert [row["path"] for row in table] == [str(path) for path in paths]
    values, indices = probabilities(task, paths).topk(2)
    assert [row["label"] for row in table] == [CLASSES[i] for i in indices[:, 0]]
    assert [row["label_2"] for row in table] == [CLASSES[i] for i in indices[:, 1]]
    np.testing.assert_allclose([float(row["probability"]) for row in table], values[:, 0], atol=1e-4)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 41  # a line per image, and where the file is
    assert f"{values[0, 0]:.1%}" in printed.out.splitlines()[0]
    assert "40 images" in printed.err
    assert [path.name for path in out.iterdir()] == ["predictions.csv"]


def test_a_long_table_is_cut_only_when_a_file_holds_it(model, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "ROWS", 4)
    assert room.main([str(model), str(pictures)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert room.main([str(model), str(pictures), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "36 more" in lines[4]
    assert len(rows(tmp_path)) == 40


def test_unreadable_images_are_named_counted_and_left_out(model, pictures, tmp_path, capsys):
    whole = save(tmp_path / "whole.png", size=(300, 300)).read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "empty.png").touch()
    assert room.main([str(model), str(pictures), "--out", str(tmp_path / "out"), "--batch", "8"]) == 0
    printed = capsys.readouterr()
    for name in ("cut.png", "text.jpg", "empty.png"):
        assert f"skipped {pictures / name}: " in printed.err
        assert name not in printed.out
    assert "3 skipped because they could not be read" in printed.err
    assert len(rows(tmp_path / "out")) == 40


def test_labels_print_the_accuracy(model, task, pictures, tmp_path, capsys):
    paths = sorted(pictures.rglob("*.png"))
    targets = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    best = probabilities(task, paths).topk(5).indices
    first = int((best[:, 0] == targets).sum())
    five = int((best == targets[:, None]).any(1).sum())
    assert 0 < first < five < 40  # a count that a mix-up of classes would change
    (pictures / "bird" / "damaged.png").touch()
    out = tmp_path / "out"
    assert room.main([str(model), str(pictures), "--labels", "--top", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"top-1 {first / 40:.2%}  ({first} of 40)" in printed.out
    assert f"top-5 {five / 40:.2%}  ({five} of 40)" in printed.out
    assert "1 skipped" in printed.err
    assert list(rows(out)[0]) == ["path", "label", "probability", "target"]
    assert sum(row["label"] == row["target"] for row in rows(out)) == first
    counted = Predictor(model).accuracy(pictures)
    assert (counted.first, counted.among_five, counted.images, counted.skipped) == (first, five, 40, 1)
    assert counted.top1 == first / 40


def test_bad_input(model, pictures, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    (tmp_path / "text.onnx").write_text("not a model")
    foreign = onnx.load(str(model))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    save(tmp_path / "wrong" / "birb" / "a.png")

    def variant(**entries):
        changed = onnx.load(str(model))
        for entry in changed.metadata_props:
            entry.value = entries.get(entry.key.removeprefix("zoo."), entry.value)
        path = tmp_path / f"{'-'.join(entries)}.onnx"
        onnx.save(changed, str(path))
        return path

    image = next(pictures.rglob("*.png"))
    cases = [
        ([tmp_path / "none.onnx", image], "there is no model file at"),
        ([tmp_path / "text.onnx", image], "is no ONNX file that onnxruntime can open"),
        ([tmp_path / "foreign.onnx", image], "is not a model that `zoo export` made"),
        ([variant(format="2"), image], "has format 2, but this predictor.py reads up to 1"),
        ([variant(img_size="[]"), image], "is not a model that `zoo export` made"),
        ([variant(task="telepathy"), image], "for the task 'telepathy'; known here: classification"),
        ([variant(in_chans="4"), image], "takes images of 4 channels"),
        ([model, tmp_path / "nowhere"], "there is no image or folder at"),
        ([model, tmp_path / "bare"], "there is no image in"),
        ([model, tmp_path / "bad"], "none of the 1 images can be read"),
        ([model, tmp_path / "bad", "--labels"], "is named like no class of the model"),
        ([model, tmp_path / "wrong", "--labels"], "Did you mean 'bird'?"),
        ([model, image, "--out", image], "cannot be written to"),
        ([model, image, "--top", "0"], "'0' is no whole number of at least 1"),
        ([model, image, "--batch", "many"], "'many' is no whole number of at least 1"),
        ([model], "the following arguments are required: images"),
    ]
    for arguments, message in cases:
        assert room.main([str(argument) for argument in arguments]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    with pytest.raises(PredictorError, match="no provider 'TPU'"):
        Predictor(model, providers=["TPU"])


def test_failure_while_running_is_status_1_and_leaves_no_half_table(model, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Predictor, "run", lambda self, batch: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert room.main([str(model), str(pictures), "--out", str(tmp_path / "out")]) == 1
    assert "error: out of memory" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_keeps_the_old_table(model, pictures, tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    (tmp_path / "predictions.csv").write_text("of yesterday")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += f"sys.path.insert(0, {str(Path(room.__file__).parent)!r}); import predictor\n"
    code += f"sys.exit(predictor.main([{str(model)!r}, {str(pictures)!r}, '--out', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "predictions.csv").read_text() == "of yesterday"
    assert not list(tmp_path.glob(".*.part"))


BLOCKED = (
    "import sys\nfor name in ('torch', 'zoo', 'timm', 'torchvision', 'onnx', 'lightning'): sys.modules[name] = None\n"
)


@pytest.fixture
def folder(model, tmp_path):
    return bundle(model, tmp_path / "bundle")


def program(folder, *arguments, limit=120):
    """The bundle's predictor, in its folder, in a process where neither torch nor zoo can be imported."""
    code = f"{BLOCKED}import runpy\nsys.argv = {['predictor.py', *map(str, arguments)]!r}\n"
    code += "runpy.run_path('predictor.py', run_name='__main__')"
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit, check=False)


def test_bundle_runs_without_torch_and_zoo(folder, model, task, pictures):
    names = ["README.txt", "predictor.py", "requirements.txt", "tiny.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == names
    done = program(folder, "tiny.onnx", pictures, "--out", "results")
    assert done.returncode == 0, done.stderr
    paths = sorted(pictures.rglob("*.png"))
    expected = [CLASSES[i] for i in probabilities(task, paths).argmax(-1)]
    assert [row["label"] for row in rows(folder / "results")] == expected
    assert program(folder, "tiny.onnx", "nowhere").returncode == 2


def test_bundle_says_how_it_is_used(folder):
    text = (folder / "README.txt").read_text()
    assert "pip install -r requirements.txt" in text
    assert "python predictor.py tiny.onnx IMAGES" in text
    needs = [line.split(">=")[0] for line in (folder / "requirements.txt").read_text().splitlines()]
    assert needs == ["numpy", "pillow", "onnxruntime"]


def test_bundle_again_and_in_place(folder, model):
    (folder / "mine.txt").write_text("mine")
    assert bundle(folder / "tiny.onnx", folder) == folder
    assert bundle(model, folder) == folder
    assert (folder / "tiny.onnx").read_bytes() == model.read_bytes()
    assert (folder / "mine.txt").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]


def test_bundle_of_bad_input(model, tmp_path):
    with pytest.raises(UsageError, match="there is no model file"):
        bundle(tmp_path / "none.onnx", tmp_path / "bundle")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be filled"):
        bundle(model, tmp_path / "file")
    assert not (tmp_path / "bundle").exists()


def test_predictor_imports_three_packages_only():
    import ast

    names = set()
    for node in ast.walk(ast.parse(Path(room.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy", "PIL", "onnxruntime"}


def test_output_that_is_cut_off_ends_quietly(folder, pictures):
    code = f"{BLOCKED}import runpy\nsys.argv = ['predictor.py', 'tiny.onnx', {str(pictures)!r}, '--batch', '1']\n"
    code += "runpy.run_path('predictor.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 0
    process.stderr.close()
