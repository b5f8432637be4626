"""Where and with what a record was made, and the files of records."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).resolve().parent / "records"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def hardware(device: str) -> dict[str, Any]:
    """Name, memory and driver of the device."""
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        return {
            "name": facts.name,
            "memory_gb": round(facts.total_memory / 1e9, 1),
            "driver": driver[0] if driver else "unknown",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return {"name": f"CPU {names[0] if names else platform.machine()}", "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of everything that a figure hangs on; attnzoo from its source, since it need not be installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "timm"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            continue
    own = re.search(r'__version__ = "(.+)"', (ROOT / "zoo" / "__init__.py").read_text())
    return found | ({"attnzoo": own[1]} if own else {})


def commit() -> str | None:
    """The commit of the checkout, marked where files of it were changed; None outside of git."""
    name = _output("git", "rev-parse", "HEAD")
    if not name:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "zoo", "tools/bench")
    return name + (" + changes" if changed else "")


def about(device: str, command: str) -> dict[str, Any]:
    """What every record of a run says of it."""
    return {
        "device": hardware(device),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commands": [command],
        "commit": commit(),
    }


def path_of(record: dict[str, Any], folder: Path) -> Path:
    """One file a case and kind of device: a newer run of the same takes its place."""
    device = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    return folder / f"{record['case']}.{device}.json"


def merged(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A record with the rows of an earlier one that it has not made again, if they come from the same versions.

    Those name their own date and commit.
    """
    if any(record[key] != before.get(key) for key in ("versions", "device", "quick", "dtype")):
        return record

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether they are about the same; one that failed before any pass stands for all passes."""
        passes = {one.get("pass"), other.get("pass")} - {None}
        return (one["side"], one["mode"]) == (other["side"], other["mode"]) and len(passes) < 2

    new = [row for row in record["rows"] if row["status"] != "left out"]
    made = {"date": before["date"], "commit": before.get("commit")}
    kept = [made | row for row in before["rows"] if not any(same(row, one) for one in new)]
    left = [row for row in record["rows"] if row["status"] == "left out" and not any(same(row, one) for one in kept)]
    commands = [*before["commands"], *record["commands"]] if kept else record["commands"]
    return record | {"rows": kept + new + left, "commands": list(dict.fromkeys(commands))}


def said(about: dict[str, Any]) -> str:
    """Device and versions, in a line."""
    return f"{about['device']['name']}; " + ", ".join(f"{name} {one}" for name, one in about["versions"].items())


def write(record: dict[str, Any], folder: Path, add: bool = False) -> Path:
    """Writes a record; `add` keeps what an earlier one of this case has and this one has not."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(record, folder)
    if add and path.is_file():
        record = merged(record, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


NEEDED = ("case", "kind", "title", "device", "versions", "date", "commands", "rows")


def load(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder.

    Raises:
        ValueError: a record lacks what a table needs.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in NEEDED if not record.get(key)]
        if missing:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; make it again with python -m tools.bench")
        records.append(record)
    return records
