"""Errors that are the user's to mend: what was given, what is valid, what to do next."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input or usage; its message is complete on its own. The `zoo` command answers it with exit status 2."""


def unknown(kind: str, given: object, valid: Iterable[str]) -> UsageError:
    """The error for a name that does not exist: names the closest valid ones and lists the rest when they are few.

    Args:
        kind: what the name should have been, for instance "attention" or "option of 'softmax'".
        given: the name as the user wrote it.
        valid: every name that would have worked.
    """
    choices = sorted(set(valid))
    close = difflib.get_close_matches(str(given), choices, n=3, cutoff=0.5)
    message = f"unknown {kind} {given!r}."
    if close:
        message += " Did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not choices:
        message += " There are none."
    elif len(choices) <= 40:
        message += " Valid: " + ", ".join(choices) + "."
    return UsageError(message)


def missing_extra(extra: str, package: str) -> UsageError:
    """The error for a command whose optional dependency is not installed."""
    return UsageError(f"this needs {package}, which is not installed. Install it with: pip install 'attnzoo[{extra}]'")
