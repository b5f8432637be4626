"""Heads over the maps of a backbone; they know no concrete one."""

from zoo.errors import unknown
from zoo.heads.anomaly import METHODS, create_detector

__all__ = ["create_detector", "list_heads"]

_KINDS = {"anomaly": METHODS}


def list_heads(kind: str) -> list[str]:
    """Names of the heads of a kind.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in _KINDS:
        raise unknown("kind of head", kind, _KINDS)
    return sorted(_KINDS[kind])
