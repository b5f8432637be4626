"""Heads over the maps of a backbone; they know no concrete one."""

from collections.abc import Mapping

from zoo.errors import unknown
from zoo.heads.anomaly import METHODS, create_detector
from zoo.heads.segmentation import HEADS, create_segmenter

__all__ = ["create_detector", "create_segmenter", "list_heads"]

_KINDS: dict[str, Mapping[str, object]] = {"anomaly": METHODS, "segmentation": HEADS}


def list_heads(kind: str) -> list[str]:
    """Names of the heads of a kind.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in _KINDS:
        raise unknown("kind of head", kind, _KINDS)
    return sorted(_KINDS[kind])
