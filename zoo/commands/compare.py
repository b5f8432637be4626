"""`zoo compare`: trains mechanisms or networks under one budget each, and tabulates what came of it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.commands.arguments import Parser, need
from zoo.commands.comparison import Entry, Plan, merged, read_plan
from zoo.errors import UsageError

_ABOUT = """Train a list of attention mechanisms or backbones under one budget each and compare them. Everything lies in
runs/NAME: a run folder and a log for each entry and seed, comparison.md, .csv, .json and .png. The same line again goes
on where an interrupted comparison stopped; entries that failed are tried again."""
_MORE = """overrides are those of `zoo fit` and count for every entry, for instance
  --data.root DIR   --data.num_workers N   --trainer.accelerator cpu"""
_PLAN = "plan.json"


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo compare`."""
    parser = Parser(command, "--config COMPARISON [--run NAME] [--only PATTERN] [overrides]", _ABOUT, _MORE)
    parser.add_argument("--config", "-c", metavar="COMPARISON", help="name or path, such as compare/cifar10_attention")
    parser.add_argument("--run", metavar="NAME", help="folder runs/NAME, or a path (default: the comparison's name)")
    parser.add_argument("--only", metavar="PATTERN", help="train only entries that fit; the table shows all")
    options, overrides = parser.parse_known_args(arguments)
    if options.config is None:
        raise UsageError("give a comparison: zoo compare --config compare/cifar10_attention")
    need("train", "lightning", "jsonargparse", "rich", "torchmetrics", "matplotlib")

    from zoo.catalogue import match
    from zoo.commands.runs import run_folder
    from zoo.resources import find_recipe

    path = find_recipe(options.config)
    plan = read_plan(path)
    folder = run_folder(options.run or path.stem)
    chosen = match(options.only, [entry.name for entry in plan.entries])
    if not chosen:
        raise UsageError(f"--only {options.only!r} fits no entry of {path.name}")
    keep_plan(folder, plan)
    work = [(entry, seed) for seed in plan.seeds for entry in plan.entries if entry.name in chosen]
    records = known(folder, plan)
    refused: list[str] = []
    for number, (entry, seed) in enumerate(work, 1):
        if "failed" in records.get((entry.name, seed), {"failed": ""}):
            record = train(folder, plan, entry, seed, overrides)
            records[entry.name, seed] = record
            print(f"{number} of {len(work)}: {said(entry, seed, record, plan)}", flush=True)
            report(folder, plan, records)
            # What is wrong with a line that all entries share is wrong for all of them; a failure may be one entry's.
            refused.append(record["failed"] if record.get("refused") else "")
            if len(refused) == 2 and refused[0] and refused[0] == refused[1]:
                raise UsageError(
                    "the first two could not be trained for one reason, so that the others were not tried: "
                    f"{refused[0]} Logs: {folder}"
                )
    rows = report(folder, plan, records)
    if not any(row["seeds"] for row in rows):
        reason = next(row["failed"] for row in rows if row["failed"])
        raise UsageError(f"no entry could be trained; the first says: {reason}. Logs: {folder}")
    close(folder, rows)


def keep_plan(folder: Path, plan: Plan) -> None:
    """Writes down what is compared, or makes sure that the folder holds this comparison.

    Raises:
        UsageError: it holds another one, or something else.
    """
    path = folder / _PLAN
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan.content:
            raise UsageError(f"{folder} holds another comparison (see {path}); choose another --run")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else than a comparison; choose another --run")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan.content, indent=1) + "\n", encoding="utf-8")


def place(folder: Path, entry: Entry, seed: int) -> Path:
    """The run folder of an entry."""
    return folder / f"{entry.name}-seed{seed}"


def known(folder: Path, plan: Plan) -> dict[tuple[str, int], dict[str, Any]]:
    """The records of what is finished, and why the last try of another entry failed."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in plan.entries:
        for seed in plan.seeds:
            run, reason = place(folder, entry, seed), failure(folder, entry, seed)
            record = read_record(run, plan)
            if record is not None:
                found[entry.name, seed] = record
            elif reason.is_file():
                found[entry.name, seed] = {"failed": reason.read_text(encoding="utf-8")}
    return found


def failure(folder: Path, entry: Entry, seed: int) -> Path:
    """Where it stands why an entry failed, so that its row says so however often the comparison goes on."""
    return folder / f"{entry.name}-seed{seed}.failed"


def read_record(run: Path, plan: Plan) -> dict[str, Any] | None:
    """The record of a run, with its multiply-adds; None unless it is finished and measured."""
    path = run / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record if "top1" in record.get(plan.accuracy, {}) and "gmacs" in record else None


def train(folder: Path, plan: Plan, entry: Entry, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains and measures one entry; its record, or {"failed": reason}."""
    reason = failure(folder, entry, seed)
    reason.unlink(missing_ok=True)
    record = attempt(folder, plan, entry, seed, overrides)
    if "failed" in record:
        partial = reason.with_suffix(".part")
        partial.write_text(record["failed"], encoding="utf-8")
        partial.replace(reason)
    return record


def attempt(folder: Path, plan: Plan, entry: Entry, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What `train` answers."""
    import yaml

    run, log = place(folder, entry, seed), folder / f"{entry.name}-seed{seed}.log"
    if run.is_dir() and not (run / "record.json").is_file():
        # What an interrupted comparison left of this run: its budget counts from the start.
        shutil.rmtree(run)
    overlay = folder / f"{entry.name}-seed{seed}.yaml"
    overlay.write_text(yaml.safe_dump(plan.overlay(entry, seed)), encoding="utf-8")
    line = ["fit", "--config", plan.recipe, "--config", str(overlay), *overrides]
    log.write_text("", encoding="utf-8")
    try:
        if not (run / "record.json").is_file():
            overlay.write_text(yaml.safe_dump(merged(plan.overlay(entry, seed), limit(plan, line, log))))
            call([*line, "--run", f"{run}"], log)
        if plan.accuracy == "test":
            call(["test", "--run", str(run), *accelerator(overrides)], log)
        path = run / "record.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["gmacs"] = gmacs(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (_Failed, UsageError) as error:
        # A network that cannot be built is found out by counting, too.
        return {"failed": str(error), "refused": isinstance(error, UsageError)}
    return read_record(run, plan) or {"failed": f"the run measured no top-1 accuracy on {plan.accuracy!r}"}


def accelerator(overrides: Sequence[str]) -> list[str]:
    """The override that says which device is used, for a test on the same one."""
    option = "--trainer.accelerator"
    for index, part in enumerate(overrides):
        if part.startswith(f"{option}="):
            return [part]
        if part == option:
            return [f"{option}={value}" for value in overrides[index + 1 : index + 2]]
    return []


class _Failed(Exception):
    """An entry could not be trained; says why."""


def limit(plan: Plan, line: Sequence[str], log: Path) -> dict[str, Any]:
    """The budget, as a recipe says it, and one validation at its end: others would be paid for in training.

    A number of multiply-adds becomes as many steps of whole batches as fit into it, at least one.
    """
    import yaml

    kind, amount = plan.budget
    run = {"max_epochs": -1, "check_val_every_n_epoch": 10**6}
    if kind == "seconds":
        days, seconds = divmod(max(1, round(amount)), 86400)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        clock = f"{days:02}:{hours:02}:{minutes:02}:{seconds % 60:02}"
        return {"trainer": {**run, "max_time": clock, "max_steps": -1}}
    settings = yaml.safe_load(call([*line, "--print_config"], log))
    each = gmacs(settings)
    if each is None:
        raise _Failed("its multiply-adds cannot be counted; give a budget of seconds")
    steps = int(amount / (each * settings["data"]["init_args"]["batch_size"]))
    return {"trainer": {**run, "max_time": None, "max_steps": max(1, steps)}}


def gmacs(settings: dict[str, Any]) -> float | None:
    """1e9 multiply-adds of one image through the network that a run's settings describe, forward; None if unknown."""
    from zoo.catalogue import count_macs
    from zoo.tasks.backbone import create_backbone, own_size
    from zoo.tasks.base import pair

    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    size = data.get("img_size")
    height, width = own_size(model["backbone"]) if size is None else pair(size)
    network = create_backbone(
        model["backbone"],
        num_classes=10,
        img_size=(height, width),
        in_chans=data.get("in_chans", 3),
        attn=model.get("attn"),
        attn_options=model.get("attn_options"),
        options=model.get("backbone_options"),
    )
    macs = count_macs(network.eval(), (data.get("in_chans", 3), height, width))
    return None if macs is None else round(macs / 1e9, 6)


def call(arguments: Sequence[str], log: Path) -> str:
    """Runs `zoo` in a process of its own, so that memory and failures are one entry's; its output goes to the log.

    Raises:
        UsageError: it refused what it was given.
        _Failed: it ended with another error, whose message this one has, as the other does.
    """
    process = subprocess.run([sys.executable, "-m", "zoo.cli", *arguments], capture_output=True, text=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ zoo {' '.join(arguments)}\n{process.stdout}{process.stderr}\n")
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        message = (errors or lines[-1:] or [f"ended with status {process.returncode}"])[-1]
        raise UsageError(message) if process.returncode == 2 else _Failed(message)
    return process.stdout


def said(entry: Entry, seed: int, record: dict[str, Any], plan: Plan) -> str:
    """What became of a run, in a line."""
    if "failed" in record:
        return f"{entry.name}, seed {seed}, failed: {record['failed']}"
    top1 = record[plan.accuracy]["top1"]
    return f"{entry.name}, seed {seed}: {top1:.2%} after {record['train_seconds']:.0f} s, {record['steps']} updates"


def report(folder: Path, plan: Plan, records: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes what is known so far; answers the rows of the table."""
    from zoo.commands.compare_report import rows_of, write
    from zoo.tasks.callbacks.record import command_line

    rows = rows_of(plan, records)
    done = [record for record in records.values() if "failed" not in record]
    machines = dict.fromkeys(record["hardware"] for record in done)
    facts: dict[str, Any] = {
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": plan.recipe,
        "seeds": list(plan.seeds),
        "hardware": "; ".join(machines),
        "versions": done[0]["versions"] if done else {},
    }
    write(folder, plan, rows, facts)
    return rows


def close(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table, and where it lies."""
    from zoo.commands.compare_report import COLUMNS, cells
    from zoo.commands.tables import show

    show(list(COLUMNS.values()), [cells(row) for row in rows])
    print(f"table, record and picture: {folder}/comparison.md, .csv, .json, .png")
