"""The bench of segmentation networks: what a run is called, one tiny training, and the page of its records."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("segmentation_bench", ROOT / "tools" / "segmentation_bench.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["segmentation_bench"] = module
    spec.loader.exec_module(module)
    return module


def test_a_run_by_its_text(bench):
    run = bench.Run.of("upernet+hidden_channels=64+bins=[1,2]+loss=ce_dice/resnet18@3")
    assert (run.name, run.backbone, run.seed) == ("upernet", "resnet18", 3)
    assert dict(run.options) == {"hidden_channels": 64, "bins": [1, 2], "loss": "ce_dice"}
    plain = bench.Run.of("smp.unet")
    assert (plain.backbone, plain.seed) == ("tf_efficientnet_lite0", 0)
    names = {
        bench.Run.of(text).file("camvid", weights)
        for text in ("fpn", "fpn@1", "fpn+loss=dice", "fpn/resnet18", "smp.fpn")
        for weights in (True, False)
    }
    # The weights are those of one encoder: another one's record has the same name with them and without.
    assert len(names) == 9
    for wrong in ("fpn+loss", "@1", "fpn@x"):
        with pytest.raises(SystemExit, match="is no run"):
            bench.Run.of(wrong)


@pytest.fixture
def scenes(tmp_path, bench, monkeypatch):
    """A folder like CamVid's, of three images a split, and a program for it."""
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for folder in ("images", "masks"):
            (tmp_path / "camvid" / split / folder).mkdir(parents=True)
        for name in "abc":
            pixels = generator.integers(0, 256, (36, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "camvid" / split / "images" / f"{name}.png")
            mask = (pixels[..., 0] > 127).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / "camvid" / split / "masks" / f"{name}.png")
    (tmp_path / "camvid" / "classes.txt").write_text("dark\nbright\n")
    small = {"epochs": 2, "eval_shape": [36, 48], "data": {"crop_size": 32, "batch_size": 3}, "task": {"lr": 1e-2}}
    monkeypatch.setitem(bench.PROGRAMS, "camvid", small)
    return tmp_path / "camvid"


def test_a_training_leaves_a_record_and_no_path(bench, scenes, tmp_path):
    line = ["one", "fpn+hidden_channels=64/test_efficientnet@1", "--data", str(scenes), "--out", str(tmp_path / "out")]
    assert bench.main([*line, "--workers", "0"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["start"], record["seed"], record["epochs"]) == ("random", 1, 2)
    assert record["options"] == {"hidden_channels": 64}
    for stage in ("val", "test"):
        assert 0 <= record[stage]["miou"] <= 1
        assert set(record[stage]["per_class"]) == {"dark", "bright"}
    assert record["parameters_m"] > 0.1
    assert record["gmacs"] > 0
    assert str(tmp_path) not in path.read_text()
    run = bench.Run.of("fpn+hidden_channels=64/test_efficientnet@1")
    args = argparse.Namespace(out=str(tmp_path / "out"), program="camvid", weights=None, device="cpu")
    bench.speed([run], args)
    assert json.loads(path.read_text())["images_per_second"] > 0
    # What has a record is not trained again; what fails leaves its reason.
    again = ["run", "--data", str(scenes), "--out", str(tmp_path / "out"), "--no-speed"]
    assert bench.main([*again, "fpn+hidden_channels=64/test_efficientnet@1"]) == 0
    assert bench.main([*again, "fpn+width=3/test_efficientnet"]) == 1
    (log,) = (tmp_path / "out").glob("*.log")
    assert "width" in log.read_text()
    # Nothing begins after its time; what has a record counts as done.
    late = [*again, "--until", "-1", "fpn+hidden_channels=64/test_efficientnet@1"]
    assert bench.main(late) == 0
    assert bench.main([*late, "fpn/test_efficientnet"]) == 1
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_best_is_chosen_by_validation_alone(bench, tmp_path, capsys):
    records = [
        record("fpn/a", 0, 0.6),
        record("upernet/a", 0, 0.5, val={"miou": 0.9}),
        record("segformer/a", 1, 0.9),  # another seed
        record("macmd/b", 0, 0.9, start="random"),
        record("macmd/c", 0, 0.9, program="membrane"),
        record("smp.unet/a", 0, 0.95),
    ]
    for number, content in enumerate(records):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    line = ["best", "--data", str(tmp_path / "camvid"), "--out", str(tmp_path)]
    assert bench.main(line) == 0
    assert capsys.readouterr().out == "upernet/a\n"
    assert bench.Run.of("upernet/a@2").seed == 2
    assert bench.main([*line, "--start", "random"]) == 0
    assert capsys.readouterr().out == "macmd/b\n"
    with pytest.raises(SystemExit, match="no record"):
        bench.main([*line, "--program", "membrane", "--start", "random"])


def record(network, seed, miou, **more):
    return {
        "program": "camvid",
        "network": network,
        "name": network.split("/")[0],
        "options": {},
        "backbone": network.split("/")[1],
        "start": "in1k",
        "seed": seed,
        "epochs": 60,
        "training": {"lr": 0.001, "scale": [0.67, 2.0]},
        "date": "2026-01-01T00:00:00+00:00",
        "hardware": "one",
        "versions": {"torch": "2"},
        "jobs": 6,
        "fit_seconds": 60.0,
        "parameters_m": 3.42,
        "gmacs": 5.47,
        "val": {"miou": miou + 0.1},
        "test": {"miou": miou},
        "command": "x",
    } | more


def test_the_page_ranks_by_test_and_shows_the_spread(bench):
    records = [
        record("fpn/a", 0, 0.6),
        record("fpn/a", 1, 0.7, images_per_second=1234.5),
        record("smp.unet/a", 0, 0.66),
        record("fpn/b", 0, 0.4, start="random"),
    ]
    text = bench.page(records)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`smp.unet`", "`fpn`", "`fpn`"]
    assert "0.650 (0.600 to 0.700)" in rows[1]
    assert "1,234" in rows[1]
    assert rows[1].endswith("| 2 |")
    assert rows[2].count("0.400") == 1
    assert text.index("with ImageNet weights") < text.index("from scratch")
    assert "scale 0.67 to 2.0" in text


def test_the_shipped_page_is_that_of_the_shipped_records(bench):
    if bench.PAGE.is_file() or bench.RECORDS.is_dir():
        assert bench.main(["page", "--check"]) == 0


def test_a_folder_without_a_program_is_told(bench, tmp_path):
    with pytest.raises(SystemExit, match="camvid, membrane"):
        bench.main(["run", "--data", str(tmp_path), "fpn"])


def test_multiply_adds_count_attention(bench, monkeypatch):
    """What grows faster than the image: two products of all N tokens with each other, 192 channels, twelve times."""
    found = []
    for shape in ([256, 256], [256, 512]):
        monkeypatch.setitem(bench.PROGRAMS["camvid"], "eval_shape", shape)
        found.append(bench.cost(bench.Run.of("fpn/zoo_vit_tiny_patch16_224"), "camvid", ["a", "b"])["gmacs"])
    # In units of 1e9 to two digits; a class token comes to the 256 and 512.
    by_hand = 12 * 2 * 192 * (513**2 - 2 * 257**2) / 1e9
    assert found[1] - 2 * found[0] == pytest.approx(by_hand, abs=0.03)
    assert by_hand > 0.5
