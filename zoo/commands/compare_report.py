"""What `zoo compare` leaves: rows from the records of runs, as a table, a file for programs and a picture."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.commands.comparison import Plan

COLUMNS = {
    "name": "entry",
    "accuracy": "top-1 %",
    "seeds": "seeds",
    "images_per_second": "train images/s",
    "gmacs": "GMACs",
    "parameters": "parameters M",
    "peak_memory_gb": "peak GB",
    "epochs_done": "epochs",
    "confidence": "confidence",
    "paper": "paper",
}


def rows_of(plan: Plan, records: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an entry, the most accurate first; entries without any finished run last.

    Args:
        records: (entry, seed) -> record.json of the run with "gmacs", or {"failed": reason}.
    """
    rows = []
    for entry in plan.entries:
        runs = [records[entry.name, seed] for seed in plan.seeds if (entry.name, seed) in records]
        done = [run for run in runs if "failed" not in run]
        row: dict[str, Any] = {"name": entry.name, "paper": entry.paper, "confidence": entry.confidence}
        row["failed"] = next((run["failed"] for run in runs if "failed" in run), None)
        row["seeds"] = len(done)
        if done:
            found = [100 * run[plan.accuracy]["top1"] for run in done]
            row["accuracy"] = round(statistics.mean(found), 2)
            # Of the seeds as a sample; one seed has none.
            row["spread"] = round(statistics.stdev(found), 2) if len(found) > 1 else None
            row["parameters"] = round(done[0]["parameters"] / 1e6, 3)
            row["gmacs"] = done[0]["gmacs"]
            for key, digits in (("images_per_second", 1), ("peak_memory_gb", 3), ("epochs_done", 2)):
                row[key] = round(statistics.mean(run[key] for run in done), digits)
            row["train_seconds"] = round(statistics.mean(run["train_seconds"] for run in done), 1)
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("accuracy", -1.0))


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    if not row["seeds"]:
        reason = f"failed: {row['failed']}" if row["failed"] else "not trained yet"
        return [row["name"], "-", "0", "-", "-", "-", "-", "-", row["confidence"], reason]
    accuracy = f"{row['accuracy']:.2f}" + (f" ± {row['spread']:.2f}" if row["spread"] is not None else "")
    gmacs = "-" if row["gmacs"] is None else f"{row['gmacs']:.3f}"
    numbers = [f"{row['images_per_second']:,.0f}", gmacs, f"{row['parameters']:.2f}", f"{row['peak_memory_gb']:.2f}"]
    return [
        row["name"],
        accuracy,
        str(row["seeds"]),
        *numbers,
        f"{row['epochs_done']:.1f}",
        row["confidence"],
        row["paper"],
    ]


def write(folder: Path, plan: Plan, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Writes comparison.json, .csv, .md and, if anything is trained, .png into the folder.

    Args:
        facts: about the machine and the command, for all rows.
    """
    content = {"budget": dict([plan.budget]), "accuracy": plan.accuracy, **facts, "rows": list(rows)}
    _replace(folder / "comparison.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    fields = [*COLUMNS, "spread", "train_seconds", "failed"]
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    _replace(folder / "comparison.md", markdown(plan, rows, facts))
    if any(row["seeds"] for row in rows):
        from zoo.commands.compare_plot import draw

        draw(rows, folder / "comparison.png", title(plan))


def title(plan: Plan) -> str:
    """What is compared, in a line."""
    kind, amount = plan.budget
    what = f"{amount:g} s of training" if kind == "seconds" else f"{amount:g} GMACs of training images"
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    return f"{plan.recipe}: {what} each, {seeds}"


def markdown(plan: Plan, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The table as a page."""
    where = "test" if plan.accuracy == "test" else "validation"
    lines = [f"# {title(plan)}", "", f"Accuracy on the {where} images.", ""]
    if any(row.get("spread") is not None for row in rows):
        lines[-2] += " ± is the standard deviation of the seeds as a sample."
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    seeds = "seed " + ", ".join(map(str, plan.seeds))
    about = "; ".join(filter(None, (facts.get("hardware"), versions, seeds, str(facts.get("date", ""))[:10])))
    lines += ["", "```", str(facts.get("command", "")), "```", "", about, ""]
    return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
