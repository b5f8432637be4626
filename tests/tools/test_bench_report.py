"""The bench tool: records keep what was measured, and the page follows from them."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench import __main__ as cli  # noqa: E402
from tools.bench import machine, report  # noqa: E402


def test_the_table_of_mechanisms_names_what_is_slower_than_its_cost():
    def row(side, ms):
        timing = {"median_ms": ms, "low_ms": ms, "high_ms": ms}
        return {"side": side, "mode": "graph", "pass": "forward+backward", "status": "ok", "timing": timing}

    about = {"kind": "attention", "device": {"name": "GPU"}, "versions": {}, "date": "2026-01-01", "commands": ["x"]}
    records = [
        about
        | {
            "title": title,
            "growth": growth,
            "forms_map": growth == "N^2",
            "rows": [row("ours", ms), row("softmax", 2.0)],
        }
        | {"sizes": {"batch": 4, "channels": 8, "side": 64, "heads": 2}, "order": order}
        for order, (title, growth, ms) in enumerate([("slow", "N", 4.0), ("quick", "N", 1.0), ("map", "N^2", 8.0)])
    ]
    page = report.render(records)
    assert "| slow | N | no | 4,096 | 2 +- 0% | 4 +- 0% | - | 0.5x |" in page
    assert "| map | N^2 | yes | 4,096 | 2 +- 0% | 8 +- 0% | - | 0.25x |" in page
    assert "though its cost grows with N alone: slow (0.5x).\n" in page


def test_every_slow_mechanism_of_the_page_has_its_reason():
    records = [r for r in machine.load(machine.RECORDS) if r["kind"] == "attention"]
    notes = "\n".join(report.mechanism_notes(records))
    for record in records:
        ratio = report.faster(record, "forward+backward")
        if record["growth"] in ("constant", "N") and ratio is not None and ratio < 1:
            assert f"\n- {record['title']}: " in notes


def test_records_round_trip_to_the_page(tmp_path, capsys):
    page, records = tmp_path / "PAGE.md", tmp_path / "records"
    where = ["--records", str(records), "--page", str(page)]
    command = ["ops", "*_layer_c128_32_local", "--quick", "--device", "cpu", "--compare", "timm"]
    assert cli.main([*command, "--out", str(records)]) == 0
    (path,) = records.glob("*.json")
    record = json.loads(path.read_text())
    assert {"device", "versions", "date", "commit", "rates"} <= set(record)
    assert {"torch", "timm", "python", "attnzoo"} <= set(record["versions"])
    assert record["commands"] == [
        "python -m tools.bench ops '*_layer_c128_32_local' --compare timm --dtype bfloat16 --quick"
    ]
    assert cli.main(["report", "--check", *where]) == 1
    assert cli.main(["report", *where]) == 0
    assert cli.main(["report", "--check", *where]) == 0
    text = page.read_text()
    assert "toy sizes" in text
    median = next(row for row in record["rows"] if row["side"] == "timm")["timing"]["median_ms"]
    assert f"| forward | timm, eager | {report.number(median)} +- " in text
    path.write_text(path.read_text().replace('"title": "', '"title": "x'))
    assert cli.main(["report", "--check", *where]) == 1


def row(side, mode, speed, what="training", **more):
    timing = {"median_ms": 128e3 / speed, "low_ms": 128e3 / speed, "high_ms": 128e3 / speed}
    return {"side": side, "mode": mode, "pass": what, "status": "ok", "timing": timing, "batch": 128} | {
        "images_per_second": speed,
        **more,
    }


def record(**changes):
    facts = {"case": "n", "kind": "network", "title": "net", "quick": False, "dtype": "bfloat16", "peer_name": "timm n"}
    facts |= {"device": {"name": "NVIDIA H100 80GB HBM3"}, "versions": {"torch": "9"}, "date": "2026-01-02T03:04:05"}
    return facts | {"commands": ["c"], "note": "", "claim": "", "elsewhere": None} | changes


def test_a_ratio_compares_the_fastest_of_both():
    rows = [row("ours", "eager", 200, peak_gb=1.5), row("ours", "recipe", 900, peak_gb=2.5)]
    rows += [row("timm", "eager", 100, peak_gb=9.0), row("timm", "compile", 300, peak_gb=8.0)]
    (line,) = report.network_lines(record(rows=rows))
    assert line == "| net | training | 128 | timm n | 100 | 300 | - | - | 200 | - | - | - | 900 | 3x | 8 | 2.5 |"


def test_a_ratio_between_two_runs_is_marked():
    rows = [row("ours", "recipe", 900), row("timm", "eager", 100), row("timm", "compile", 300, date="2026-01-01")]
    (line,) = report.network_lines(record(rows=rows))
    assert "| 3x (**) |" in line
    assert report.OTHER_RUN in report.render([record(rows=rows)])
    rows[2] |= {"images_per_second": 50, "timing": rows[2]["timing"] | {"median_ms": 2560}}
    (line,) = report.network_lines(record(rows=rows))
    assert "| 9x |" in line
    assert report.OTHER_RUN not in report.render([record(rows=rows)])


def test_figures_from_elsewhere_count_on_the_same_kind_of_gpu_alone():
    told = {"peer": "theirs", "device": "H100", "source": "measured elsewhere"}
    told |= {"images_per_second": {"training": {"eager": 100, "compile": 200}}, "peak_gb": {"training": {"compile": 7}}}
    rows = [row("ours", "eager", 300)]
    one = record(rows=rows, elsewhere=told)
    assert "| theirs (*) | 100 | 200 | - | - | 300 | - | - | - | - | 1.5x | 7 | - |" in report.render([one])
    for other in (one | {"device": {"name": "NVIDIA H200"}}, one | {"quick": True}):
        text = report.render([other])
        assert "theirs" not in text
        assert "measured elsewhere" not in text


def test_add_keeps_rows_of_the_same_versions():
    before = record(rows=[row("ours", "eager", 1), row("timm", "eager", 2)], commands=["first"])
    now = record(rows=[row("ours", "eager", 3), row("ours", "compile", 4)], commands=["second"])
    both = machine.merged(now | {"commit": "b" * 40}, before | {"commit": "a" * 40})
    assert [row.get("commit") for row in both["rows"]] == ["a" * 40, None, None]
    told = report.machines([both])
    assert [any(f"commit {sign * 12}" in line for line in told) for sign in "abc"] == [True, True, False]
    assert [(r["side"], r["mode"], r["images_per_second"]) for r in both["rows"]] == [
        ("timm", "eager", 2),
        ("ours", "eager", 3),
        ("ours", "compile", 4),
    ]
    assert both["commands"] == ["first", "second"]
    failed = {"side": "ours", "mode": "eager", "status": "wrong", "reason": "off"}
    assert machine.merged(now, before | {"rows": [failed]})["rows"] == now["rows"]
    late = now | {"rows": [{"side": "ours", "mode": "eager", "pass": "training", "status": "left out"}]}
    kept = machine.merged(late, before)["rows"]
    assert [one | row for one, row in zip(before["rows"], kept, strict=True)] == kept
    assert machine.merged(now, before | {"versions": {"torch": "8"}}) == now


def test_the_page_of_the_project_follows_from_its_records():
    assert cli.main(["report", "--check"]) == 0
