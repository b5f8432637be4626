"""The page of results follows from the records and from nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("results", ROOT / "tools" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

RECORD = {
    "command": "zoo fit --config a/b",
    "recipe": "a/b",
    "seed": 0,
    "date": "2026-01-02T03:04:05",
    "hardware": "1 x Abacus",
    "versions": {"torch": "9.9"},
    "backbone": "zoo_x",
    "attn": "uniform",
    "img_size": [32, 64],
    "patch_size": [4, 4],
    "parameters": 5_430_000,
    "train_seconds": 100.4,
    "epochs_done": 12.34,
    "images_per_second": 61234.5,
    "peak_memory_gb": None,
    "test": {"top1": 0.87654, "top5": 0.99, "images": 10},
}


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "record.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_adding_a_run_writes_its_row_and_command(recipes):
    assert results.main(["add", str(recipes / "runs" / "one"), "--recipes", str(recipes)]) == 0
    page = (recipes / "RESULTS.md").read_text()
    assert "| `zoo_x`, attn `uniform` | 32 x 64 | 4 | 5.43 | 12.3 | 100 | 61,234 | - | 87.65 |" in page
    assert "zoo fit --config a/b" in page
    assert "1 x Abacus; torch 9.9; seed 0; 2026-01-02." in page


def test_the_best_row_comes_first(recipes):
    for name, top1 in (("low", 0.5), ("high", 0.75)):
        record = RECORD | {"backbone": name, "test": {"top1": top1}}
        (recipes / "results" / f"{name}.json").write_text(json.dumps(record))
    results.main(["--recipes", str(recipes)])
    page = (recipes / "RESULTS.md").read_text()
    assert page.index("`high`") < page.index("`low`")


def test_check_sees_a_figure_changed_by_hand(recipes, capsys):
    results.main(["add", str(recipes / "runs" / "one"), "--recipes", str(recipes)])
    assert results.main(["--check", "--recipes", str(recipes)]) == 0
    page = recipes / "RESULTS.md"
    page.write_text(page.read_text().replace("87.65", "97.65"))
    assert results.main(["--check", "--recipes", str(recipes)]) == 1


def test_a_run_without_a_test_is_refused(recipes):
    (recipes / "results" / "bad.json").write_text(json.dumps(RECORD | {"test": None}))
    with pytest.raises(SystemExit, match="lacks test"):
        results.main(["--recipes", str(recipes)])


def test_the_shipped_page_follows_from_the_shipped_records():
    assert results.main(["--check"]) == 0
