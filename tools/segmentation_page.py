"""recipes/SEGMENTATION.md: the tables of tools/segmentation_bench.py, made of its records and nothing else."""

import statistics
from typing import Any

TITLES = {
    "camvid": "CamVid, 360 x 480, 11 classes",
    "membrane": "Membrane (ISBI 2012), 512 x 512, 2 classes",
}
STARTS = {"in1k": "encoder with ImageNet weights", "random": "from scratch"}
LABELS = {"miou": "mIoU", "dice": "Dice", "boundary_f1": "boundary F1"}


def page(records: list[dict[str, Any]]) -> str:
    """recipes/SEGMENTATION.md for these records."""
    lines = [
        "# Segmentation networks, one program",
        "",
        "Written by `python tools/segmentation_bench.py page` from the records in",
        "[results/segmentation/](results/segmentation/). Within a table every network had the same images in the",
        "same order, augmentation, optimizer, schedule, epochs and precision; the weights of the last epoch are",
        "judged. `smp.` marks networks of segmentation_models_pytorch. Several seeds: mean, and in brackets the",
        "smallest and the largest value. Each row's command is in its record.",
    ]
    for program, title in TITLES.items():
        for start, words in STARTS.items():
            rows = [r for r in records if (r["program"], r["start"]) == (program, start)]
            if rows:
                lines += ["", f"## {title}: {words}", "", *_table(rows), "", *_remarks(rows)]
    return "\n".join(lines) + "\n"


def _table(records: list[dict[str, Any]]) -> list[str]:
    columns = [
        (stage, key)
        for stage in ("val", "test")
        for key in LABELS
        if any(key in record.get(stage, {}) for record in records)
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["network"], []).append(record)
    stage, key = next((c for c in columns if c == ("test", "miou")), columns[0])
    ordered = sorted(groups.values(), key=lambda group: (-_mean(group, stage, key), group[0]["network"]))
    head = ["network", "encoder", "params M", "GMACs", "images/s", *(f"{s} {LABELS[k]}" for s, k in columns), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in ordered:
        first = group[0]
        rate = next((f"{r['images_per_second']:,.0f}" for r in group if "images_per_second" in r), "-")
        cells = [f"`{_name(first)}`", f"`{first['backbone']}`", f"{first['parameters_m']:.1f}", f"{first['gmacs']:.1f}"]
        cells += [rate, *(_spread(group, s, k) for s, k in columns), str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _name(record: dict[str, Any]) -> str:
    return " ".join([record["name"], *(f"{key}={value}" for key, value in record["options"].items())])


def _values(group: list[dict[str, Any]], stage: str, key: str) -> list[float]:
    return [record[stage][key] for record in group if key in record.get(stage, {})]


def _mean(group: list[dict[str, Any]], stage: str, key: str) -> float:
    return statistics.fmean(_values(group, stage, key) or [0.0])


def _spread(group: list[dict[str, Any]], stage: str, key: str) -> str:
    values = _values(group, stage, key)
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def _remarks(records: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    epochs = sorted({record["epochs"] for record in records})
    training = ", ".join(f"{key} {_plain(value)}" for key, value in first["training"].items())
    seconds = [record["fit_seconds"] for record in records]
    jobs = max(record["jobs"] for record in records)
    found = [
        f"{' or '.join(map(str, epochs))} epochs; {training}.",
        f"A training took {min(seconds):.0f} to {max(seconds):.0f} s, up to {jobs} of them on the device at a time.",
    ]
    return found + sorted({_machine(record) for record in records})


def _plain(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) and len(value) == 2 else str(value)


def _machine(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    return f"{record['hardware']}; {versions}; {record['date'][:10]}."
