"""What a run that goes on must keep of the one it goes on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import UsageError

# The checkpoint's optimizer goes on with its own.
_OPTIMIZER = ("optimizer", "optimizer_options", "lr", "weight_decay", "layer_decay")
# Otherwise images that were trained on would be validated on, or the best epoch be chosen by numbers of two kinds.
_SPLIT = ("dataset", "category", "layout", "train_split", "val_split", "test_split", "seed")
_JUDGED = ("synthetic", "resize", "tile", "tile_overlap", "eval_size")


def check_resumable(checkpoint: Path, task: Any, data: Any) -> None:
    """Compares the options of a run that is to go on with those that its checkpoint was made with.

    Raises:
        UsageError: one of them differs that the checkpoint decides, or that its validation stands on.
    """
    from zoo.tasks.weights import read_file

    content = read_file(checkpoint)
    _compare("model", content.get("hyper_parameters"), getattr(task, "hparams", {}), _OPTIMIZER)
    given = getattr(data, "hparams", {})
    # A threshold of scores is one of the size at which things are seen; a classifier may go on with larger images.
    names = (*_SPLIT, *_JUDGED, *(("img_size",) if "synthetic" in given else ()))
    _compare("data", content.get("datamodule_hyper_parameters"), given, names)


def _compare(group: str, saved: Mapping[str, Any] | None, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    saved = saved or {}
    for name in names:
        if name in saved and name in given and _plain(saved[name]) != _plain(given[name]):
            why = (
                "the optimizer goes on as the checkpoint holds it"
                if group == "model"
                else "its validation stands on it"
            )
            raise UsageError(
                f"the run was trained with --{group}.{name} {saved[name]}, but is to go on with {given[name]}: {why}. "
                "Resume without that option, or start another run"
            )


def _plain(value: Any) -> Any:
    """One value, however a checkpoint or the command line holds it: nothing given is as good as an empty one."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()} or None
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value] or None
    return str(value) if isinstance(value, Path) else value
