"""What the bench of anomaly detection may look at, how it judges, and that its page follows from its records."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("anomaly_bench", ROOT / "tools" / "anomaly_bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture
def data(tmp_path):
    """20 groups of 3 good images, and test images of two kinds; files without content."""
    root = tmp_path / "magnetic_tile"
    rows = [(f"g{g:02d}_{i}.jpg", str(g), "train/good") for g in range(20) for i in range(3)]
    rows += [("t.jpg", "90", "test/good"), ("x.jpg", "91", "excluded")]
    for folder in ("train/good", "test/good", "test/crack", "ground_truth/crack"):
        (root / "tile" / folder).mkdir(parents=True)
    for name, _, split in rows[:-1]:
        (root / "tile" / split / name).touch()
    with open(root / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows([("source_class", "file", "group", "split"), *(("MT", *row) for row in rows)])
    return root


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_validation_shares_no_group_with_training_and_sees_no_test_image(data, tmp_path):
    folder = tmp_path / "view"
    folder.mkdir()
    assert bench.view(data, folder, "val", None, 0) == 3 * (20 - bench.HELD_OUT)
    learned, held = names(folder / "train" / "good"), names(folder / "validation" / "good")
    assert len(learned) + len(held) == 60
    assert not {name[:3] for name in learned} & {name[:3] for name in held}
    assert names(folder) == ["train", "validation"]
    # Nothing reachable from here is a test image.
    assert {path.resolve().parent for path in folder.rglob("*.jpg")} == {(data / "tile" / "train" / "good").resolve()}


def test_a_test_learns_from_all_good_images_or_some(data, tmp_path):
    for number, (normals, seed) in enumerate([(None, 0), (7, 0), (7, 0), (7, 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert bench.view(data, folder, "test", normals, seed) == (60 if normals is None else normals)
        assert (folder / "test" / "good" / "t.jpg").is_file()
    assert names(tmp_path / "1" / "train" / "good") == names(tmp_path / "2" / "train" / "good")
    assert names(tmp_path / "1" / "train" / "good") != names(tmp_path / "3" / "train" / "good")


def test_judges_images_and_pixels_as_sklearn_does():
    generator = np.random.default_rng(0)
    judge, scores, maps, masks = bench.Judge(), [], [], []
    for index in range(12):
        mask = np.zeros((20, 24), bool)
        mask[4:9, 3:7] = index % 3 == 0
        heat = (generator.random((20, 24)) + 0.3 * mask).astype(np.float32)
        judge.update(torch.tensor([float(heat.max())]), torch.from_numpy(heat)[None], torch.from_numpy(mask)[None])
        scores.append(heat.max())
        maps.append(heat)
        masks.append(mask)
    found = judge.compute()
    truth = [mask.any() for mask in masks]
    # Rounded to four digits, and the pixels are binned with an error of at most 1e-4.
    assert found["image_auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=6e-5)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(masks), np.ravel(maps)), abs=2e-4)
    assert found["images"] == 12
    assert {"aupro_0.3", "aupro_0.1", "aupro_0.05", "aupro_0.01"} < set(found)


def test_every_configuration_can_be_made():
    for name, config in bench.CONFIGS.items():
        detector = bench.detector_of(config, False)
        assert detector.head.needs_gradient == (config["method"] == "l2bt"), name


def record(config, normals, split, auroc):
    values = {"image_auroc": auroc, "pixel_auroc": 0.9} | {f"aupro_{v:g}": v for v in bench.LIMITS}
    return {
        "command": f"python tools/anomaly_bench.py run {config} --split {split}",
        "config": config,
        "normals": normals,
        "hardware": "Abacus, 2 CPU cores, 1 threads",
        "versions": {"torch": "9.9"},
        "seed": 0,
        "date": "2026-01-02T03:04:05",
        "per_image": {"ms": 12.34, "cpu_ms": 11.9, "peak_mb": 99.6, "threads": 1},
        split: {"all": values} | ({"without_uneven": values} if split == "test" else {}),
    }


def test_the_page_follows_from_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDS", tmp_path)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    for name, auroc in (("low", 0.5), ("high", 0.75)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(name, 300, "test", auroc)))
    (tmp_path / "val.json").write_text(json.dumps(record("low", 646, "val", 0.6)))
    assert bench.main(["page"]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| `high` | 300 | 0.750 | 0.900 | 0.300 | 0.100 | 0.050 | 0.010 | 12 | 12 | 100 |" in text
    assert text.index("`high`") < text.index("`low`") < text.index("## Validation")
    assert "run high --split test" in text
    assert bench.main(["page", "--check"]) == 0
    (tmp_path / "page.md").write_text(text.replace("0.750", "0.950"))
    assert bench.main(["page", "--check"]) == 1


def test_the_kept_page_is_what_the_kept_records_say():
    if not bench.RECORDS.is_dir():
        pytest.skip("no records are kept yet")
    assert bench.main(["page", "--check"]) == 0


@pytest.mark.parametrize(
    "spelling",
    [
        ["--data", "/some/where/tiles", "--weights", "/some/where/w.safetensors", "--out", "/a/b"],
        ["--data=/some/where/tiles", "--weights=/some/where/w.safetensors", "--out=/a/b"],
        ["--dat", "/some/where/tiles", "--weigh=/some/where/w.safetensors", "--ou", "/a/b", "--device", "cpu"],
    ],
)
def test_no_path_of_a_machine_is_kept(spelling):
    args = bench.parser().parse_args(["run", "l2bt_224", *spelling, "--split", "test", "--normals=300"])
    wanted = ["run", "l2bt_224", "--data", "magnetic_tile", "--weights", "efficientnet_lite0_in1k.safetensors"]
    assert bench.public(args, bench._plain("l2bt_224")) == [*wanted, "--split", "test", "--normals", "300"]


def test_the_kept_records_name_no_place_on_a_machine():
    for path in bench.RECORDS.glob("*.json"):
        assert not re.search(r"(?<![\w.])/\w", path.read_text()), path.name
