"""recipes/ANOMALY.md: the tables of tools/anomaly_bench.py, made of its records and nothing else."""

from typing import Any

LIMITS = (0.3, 0.1, 0.05, 0.01)


def page(records: list[dict[str, Any]]) -> str:
    """recipes/ANOMALY.md for these records."""
    lines = [
        "# Detectors of anomalies on magnetic_tile",
        "",
        "Written by `python tools/anomaly_bench.py page` from the records in [results/anomaly/](results/anomaly/).",
        "Configurations were chosen on `val` rows (good images of other tiles than those learned from, each also with",
        "drawn defects); `test` rows were measured afterwards. Maps and masks are compared on a grid of 224 x 224.",
        "Time and memory are those of one image at a time; ms is by the wall, on a machine that may do other work too.",
        "`memory_bank_224` from 300 normals met the test images three times: its image score came from the smoothed",
        "map first (0.762), then from the places (0.764), and now its local mean has zeros beyond the border, as the",
        "peer's has: without them the farthest place of most good images is at the border. A comparison of both on",
        "good images for learning showed it, and `val` agreed.",
        "Other banks met the test images before that change too, and are gone with it: directions of vectors at 224",
        "pixels reached image AUROC 0.874 and AU-PRO 0.689, at 448 pixels 0.853 and 0.745.",
        "",
        "For comparison, PatchCore of anomalib 2.7 on the same backbone and split, at 224 pixels, from 300 normals:",
        "image AUROC 0.840, pixel AUROC 0.784, AU-PRO 0.3 0.682; without `uneven` 0.848, 0.970, 0.771.",
    ]
    columns = ("configuration", "normals", "image AUROC", "pixel AUROC", *(f"AU-PRO {limit:g}" for limit in LIMITS))
    timing = ("ms", "CPU ms", "MB")
    shown = (
        ("test", "all", "Test, all kinds", timing),
        ("test", "without_uneven", "Test without `uneven`", ()),
        ("test", "all_own_size", "Test, all kinds, at the images' own sizes", ()),
        ("val", "all", "Validation", timing),
    )
    for split, part, title, more in shown:
        rows = [record for record in records if part in record.get(split, {})]
        if not rows:
            continue
        head = (*columns, *more)
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for record in sorted(rows, key=lambda r: (-r[split][part]["image_auroc"], r["config"])):
            lines.append("| " + " | ".join(_cells(record, record[split][part], more)) + " |")
    lines += ["", "```", *sorted({record["command"] for record in records}), "```", ""]
    lines += sorted({_machine(record) for record in records})
    return "\n".join(lines) + "\n"


def _cells(record: dict[str, Any], values: dict[str, Any], more: tuple) -> list[str]:
    numbers = [values[k] for k in ("image_auroc", "pixel_auroc", *(f"aupro_{limit:g}" for limit in LIMITS))]
    device = ", GPU" if record["hardware"].startswith("1 x") else ""
    cells = [f"`{record['config']}`{device}", str(record["normals"]), *(f"{number:.3f}" for number in numbers)]
    if more:
        timed = record["per_image"]
        cells += [
            f"{timed['ms']:.0f}",
            f"{timed['cpu_ms']:.0f}" if "cpu_ms" in timed else "-",
            f"{timed['peak_mb']:.0f}",
        ]
    return cells


def _machine(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    return f"{record['hardware']}; {versions}; seed {record['seed']}; {record['date'][:10]}."
