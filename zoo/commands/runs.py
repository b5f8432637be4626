"""Run folders: their names, whether they can be written, and which of their checkpoints to use."""

import errno
import os
import shutil
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from zoo.errors import UsageError, unknown

ROOT = Path("runs")
# Less than this and the first checkpoints of even a small network will not fit.
_FREE_BYTES = 64 * 2**20


def run_folder(name: str) -> Path:
    """The folder of a run: runs/NAME, or NAME itself where it holds a slash."""
    if not name.strip() or name in (".", ".."):
        raise UsageError(f"--run {name!r}: give the run a name, or the path of its folder")
    return Path(name).expanduser() if "/" in name or os.sep in name else ROOT / name


def fresh_name(recipe: str | None) -> str:
    """A readable name that sorts by time."""
    stem = Path(recipe).stem if recipe else "fit"
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{stem}"


def check_unused(folder: Path) -> None:
    """Raises UsageError where a fresh run would write over an earlier one."""
    name = _name(folder)
    if (folder / "record.json").is_file():
        raise UsageError(
            f"{folder} already holds a finished run. Choose another --run, or train it further: "
            f"zoo fit --run {name} --resume --trainer.max_epochs N (--trainer.max_time where the clock ended it)"
        )
    if checkpoints(folder):
        raise UsageError(
            f"{folder} already holds an unfinished run. Continue it: zoo fit --run {name} --resume. "
            "Or choose another --run."
        )


def probe(folder: Path) -> None:
    """Makes the folder and tries to write into it.

    Raises:
        UsageError: it cannot be made or written, or the disk is full.
    """
    advice = "Choose another folder: --run DIR/NAME"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".trial"
        try:
            trial.write_bytes(b"0" * 4096)
        finally:
            trial.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise UsageError(f"the run folder {folder} cannot be written: {reason}. {advice}") from error
    if free < _FREE_BYTES:
        raise UsageError(f"the disk of {folder} is full: {free / 2**20:.0f} MiB are left. Make room, or: {advice}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = (folder / "checkpoints").glob("*.ckpt")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def checkpoint_to_resume(folder: Path) -> tuple[Path, int]:
    """The checkpoint that is furthest in training, and its number of updates. Damaged ones are named and passed over.

    Raises:
        UsageError: there is no run, or none of its checkpoints can be read.
    """
    from zoo.tasks.weights import read_file

    if not folder.is_dir():
        raise _no_run(folder, "There is nothing to resume")
    found: list[tuple[int, bool, Path]] = []
    for path in checkpoints(folder):
        try:
            content = read_file(path)
            # At equal updates the last one wins: the best one is written before its epoch is closed.
            found.append((int(content["global_step"]), path.stem.startswith("last"), path))
        except (UsageError, KeyError, TypeError) as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr)
    if not found:
        raise UsageError(f"there is nothing to resume: {folder} has no readable checkpoint. Start it without --resume.")
    step, _, path = max(found)
    return path, step


def find_checkpoint(given: str) -> Path:
    """A checkpoint from its path, from its run's folder, or from its run's name: the best one, else the last.

    Raises:
        UsageError: there is none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    folder = path if path.is_dir() else run_folder(given)
    # A run is often called as the folder of its images: one without checkpoints is not what is meant.
    if (ROOT / given).is_dir() and not checkpoints(folder) and not any(folder.glob("*.ckpt")):
        folder = ROOT / given
    if not folder.is_dir():
        if path.suffix:
            raise UsageError(f"there is no checkpoint {given!r}. {_known_runs()}")
        raise _no_run(folder, f"There is no checkpoint or run {given!r}")
    for name in ("best.ckpt", "last.ckpt"):
        for place in (folder, folder / "checkpoints"):
            if (place / name).is_file():
                return place / name
    others = checkpoints(folder)
    if not others:
        raise UsageError(f"the run {folder} has no checkpoint yet")
    return others[0]


def folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for one that lies elsewhere."""
    parent = checkpoint.resolve().parent
    for folder in (parent.parent, parent):
        if (folder / "config.yaml").is_file():
            return folder if not folder.is_relative_to(Path.cwd()) else folder.relative_to(Path.cwd())
    return None


def clear_empty(folders: Iterable[Path]) -> None:
    """Removes folders that nothing was written into."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _no_run(folder: Path, what: str) -> UsageError:
    names = [path.name for path in ROOT.iterdir() if path.is_dir()] if ROOT.is_dir() else []
    if folder.parent == ROOT and names:
        return UsageError(f"{what}: {unknown('run', folder.name, names)}")
    return UsageError(f"{what}: {folder} does not exist. {_known_runs()}")


def _known_runs() -> str:
    found = sorted(path.name for path in ROOT.iterdir() if path.is_dir()) if ROOT.is_dir() else []
    return f"Runs here: {', '.join(found[-8:])}." if found else "There are no runs in ./runs."


def _name(folder: Path) -> str:
    return folder.name if folder.parent == ROOT else str(folder)
