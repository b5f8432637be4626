"""Silences what a user cannot act on; everything else is shown."""

import logging
import threading
import warnings

from zoo.commands.failures import DISK_ERRORS

_LOGGED = (
    "GPU available",
    "TPU available",
    "HPU available",
    "Tip:",
    "Seed set to",
    "LOCAL_RANK",
    "Restor",
    "Loaded model weights from",
    "`Trainer.fit` stopped",
    "Using 16bit",
    "Using bfloat16",
    "Signal Interrupt",
    "Detected KeyboardInterrupt",
    "You are using the plain ModelCheckpoint",
    "You are using a CUDA device",
    # A teacher is a part of its network; the rest of the weights has no place in it.
    "found while loading pretrained weights. This may be expected",
)
# The run folder is ours and meant to be non-empty; the number of workers is the recipe's choice.
_WARNED = (
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*smaller than the logging interval.*",
    r".*LightningCLI's args parameter.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*pkg_resources is deprecated.*",
    r".*Found .* module\(s\) in eval mode at the start of training.*",
    r".*Be aware that when using `ckpt_path`.*",
    r".*Using ModelCheckpoint with manual optimization.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
)


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in _LOGGED)


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread of its own, and hands what stopped it on to the next caller: it is reported there.
    if not (isinstance(arguments.exc_value, OSError) and arguments.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(arguments)


def quiet() -> None:
    """Applies to the process; call it before the trainer is made."""
    for pattern in _WARNED:
        warnings.filterwarnings("ignore", pattern)
    # The line of Lightning's source that warns says nothing to a user.
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    threading.excepthook = _thread_failed
    drop = _Filter()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(drop)
    for name in ("lightning.fabric.utilities.seed", "timm.models._builder"):
        logging.getLogger(name).addFilter(drop)
