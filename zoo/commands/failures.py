"""The one place where an error becomes a plain message and an exit status."""

import argparse
import contextlib
import errno
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from urllib.error import URLError

from zoo.errors import UsageError

DONE, FAILED, USAGE = 0, 1, 2
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


class Interrupted(Exception):
    """Ctrl-C during a run. Says how to go on."""


class RunFailed(Exception):
    """A failure while running, with its message complete. The error behind it is its cause."""


def report(error: BaseException, debug: bool) -> int:
    """Prints what went wrong to stderr and returns the exit status.

    Args:
        error: whatever left the command.
        debug: print the traceback too.
    """
    if isinstance(error, SystemExit) and not _interrupted(error):
        return error.code if isinstance(error.code, int) else DONE if error.code is None else FAILED
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has seen enough. Python would complain once more while closing stdout.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    if debug:
        traceback.print_exception(error)
    message, status = explain(error)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return status


def explain(error: BaseException) -> tuple[str, int]:
    """The message, complete on its own, and the exit status for an error."""
    usage = next((e for e in _chain(error) if isinstance(e, UsageError)), None)
    if usage is not None:
        return _without_worker(str(usage)), USAGE
    if isinstance(error, RunFailed):
        return str(error), FAILED
    if isinstance(error, Interrupted):
        return str(error), FAILED
    if _interrupted(error):
        return "stopped by Ctrl-C", FAILED
    if isinstance(error, argparse.ArgumentError):
        return str(error), USAGE
    unreached = next((e for e in _chain(error) if _of_network(e)), None)
    if unreached is not None:
        return (
            f"a download failed: {_first(str(unreached))}. Without a network, give files: --model.pretrained FILE, "
            "--data.root FOLDER",
            FAILED,
        )
    if isinstance(error, OSError):
        return _about_files(error)
    if isinstance(error, ImportError):
        return f"{error}. Is the installation complete? pip install 'attnzoo[all]'", FAILED
    name = type(error).__name__
    text = _without_worker(str(error)).strip()
    if name == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError):
        return (
            f"out of memory. Try a smaller --data.batch_size or --data.img_size, or --trainer.precision bf16-mixed "
            f"({text.splitlines()[0][:160] if text else name})",
            FAILED,
        )
    if ("DataLoader worker" in text and "exited unexpectedly" in text) or "is killed by signal" in text:
        return f"a data worker died, mostly for want of memory: try fewer --data.num_workers ({_first(text)})", FAILED
    if name == "MisconfigurationException":
        return text, USAGE
    if name == "NonFiniteLossError":
        return text, FAILED
    return f"{name}: {_first(text)} (this should not happen; run again with --debug to see where)", FAILED


@contextlib.contextmanager
def while_running(resume: str | None, kept: str | None = None) -> Iterator[None]:
    """Around training or evaluation: says what is kept and how to go on when it fails.

    Args:
        resume: the command that continues the run, if it can be continued.
        kept: where the checkpoints are.
    """
    advice = f" Continue with: {resume}" if resume else ""
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS and "disk full" not in str(error):
            raise
        reason = DISK_ERRORS.get(error.errno or 0, "the disk is full")
        where = f": {error.filename}" if error.filename else ""
        saved = f" What was saved before is whole: {kept}." if kept else ""
        raise RunFailed(f"the run cannot be written any more, {reason}{where}.{saved}{advice}") from error
    except BaseException as error:
        if _interrupted(error):
            raise Interrupted(f"stopped by Ctrl-C.{advice}") from error
        raise


def _interrupted(error: BaseException) -> bool:
    # Lightning answers Ctrl-C with SystemExit(1) from inside its handler.
    return any(isinstance(e, KeyboardInterrupt) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_network(error: BaseException) -> bool:
    # Asked by name: none of these packages has to be there.
    client = type(error).__module__.partition(".")[0] in ("httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
    return client or isinstance(error, (socket.gaierror, URLError))


def _about_files(error: OSError) -> tuple[str, int]:
    reason = DISK_ERRORS.get(error.errno or 0) or error.strerror or str(error)
    where = f": {error.filename}" if error.filename else ""
    usage = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError))
    return f"{reason}{where}", USAGE if usage else FAILED


def _without_worker(text: str) -> str:
    """The worker's own message, out of the traceback that a DataLoader wraps around it."""
    if not text.startswith("Caught "):
        return text
    lines = text.rstrip().splitlines()
    last = max((i for i, line in enumerate(lines) if re.match(r"^[\w.]+(Error|Exception|Exit)?: ", line)), default=-1)
    return "\n".join([lines[last].split(": ", 1)[1], *lines[last + 1 :]]) if last > 0 else text


def _first(text: str, limit: int = 300) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= limit else line[:limit] + " ..."
