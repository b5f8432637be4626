"""`zoo validate` and `zoo test`: how good a checkpoint is on its own data, or on other data of the same kind."""

import tempfile
from pathlib import Path
from typing import Any

from zoo.commands.arguments import Parser, need
from zoo.errors import UsageError

_ABOUT = "How good a run's best checkpoint is, on the data it was trained with or on --data.root DIR."
_MORE = """frequent overrides: --data.root DIR   --data.test_split NAME   --data.batch_size N   --data.num_workers N
  --trainer.accelerator cpu   --trainer.precision 32-true"""


# The data of each task, for a checkpoint that was not written by this command and so names no classes.
_DATA = {
    "Classification": "ImageClassification",
    "AnomalyDetection": "AnomalyDetection",
    "Segmentation": "Segmentation",
}
# Options of the task that come from its data.
_LINKED = ("class_names", "palette", "ignore_index", "img_size", "in_chans")


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo validate` or `zoo test`."""
    parser = Parser(command, "--run NAME | --ckpt RUN_OR_CKPT [overrides]", _ABOUT, _MORE)
    parser.add_argument("--run", metavar="NAME", help="the run whose best checkpoint is used")
    parser.add_argument("--ckpt", metavar="RUN_OR_CKPT", help="a run folder, or one checkpoint")
    parser.add_argument("--config", "-c", action="append", default=[], metavar="YAML", help="further settings")
    options, overrides = parser.parse_known_args(arguments)
    if (options.run is None) == (options.ckpt is None):
        raise UsageError(f"which checkpoint? Give one of them: zoo {command} --run NAME, or --ckpt RUN_OR_CKPT")
    need("train", "lightning", "jsonargparse", "rich", "torchmetrics")

    from zoo.commands.failures import while_running
    from zoo.commands.quiet import quiet
    from zoo.commands.runs import find_checkpoint, folder_of, run_folder

    quiet()
    source = options.ckpt if options.run is None else str(run_folder(options.run))
    checkpoint = find_checkpoint(source)
    folder = folder_of(checkpoint) or checkpoint.parent
    cli = _build(checkpoint, options.config, overrides, folder)
    with while_running(None):
        method = getattr(cli.trainer, command)
        method(cli.model, datamodule=cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:
        print(_closing(command, cli.trainer, cli.model, checkpoint, folder))


def _build(checkpoint: Path, configs: list[str], overrides: list[str], folder: Path) -> Any:
    import yaml

    from zoo.commands.lightning_cli import ZooCLI
    from zoo.commands.wiring import wire_evaluation

    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "checkpoint.yaml"
        own.write_text(yaml.safe_dump(settings_of(checkpoint)), encoding="utf-8")
        return ZooCLI([str(own), *configs], overrides, wire=lambda config, task: wire_evaluation(config, task, folder))


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The model and data that a checkpoint was trained with, as a recipe.

    Raises:
        UsageError: it is no checkpoint of a run.
    """
    import torch

    from zoo.tasks.checkpoint import task_kind
    from zoo.tasks.plain import plain
    from zoo.tasks.weights import read_file

    content = read_file(checkpoint)
    if not isinstance(content, dict) or not {"hyper_parameters", "datamodule_hyper_parameters"} <= set(content):
        raise UsageError(f"{checkpoint} is no checkpoint of a run (it says nothing about its network and its data)")
    settings: dict[str, Any] = {"seed_everything": 0}
    kind = task_kind(content)
    for key, stored, default in (
        ("model", "hyper_parameters", f"zoo.tasks.{kind}"),
        ("data", "datamodule_hyper_parameters", f"zoo.data.{_DATA[kind]}"),
    ):
        values = {k: plain(v) for k, v in content[stored].items() if not k.startswith("_")}
        settings[key] = {"class_path": content[stored].get("_class_path") or default, "init_args": values}
    for section, key in (*(("model", key) for key in _LINKED), ("data", "seed")):
        settings[section]["init_args"].pop(key, None)
    # The weights are in the checkpoint; the file that training started from may be gone.
    settings["model"]["init_args"]["pretrained"] = False
    if torch.cuda.is_available() and (precision := _precision(checkpoint)):
        settings["trainer"] = {"precision": precision}
    return settings


def _precision(checkpoint: Path) -> str | None:
    """What the run used; on a CPU mixed precision is only slower."""
    from zoo.commands.parse_errors import check_yaml
    from zoo.commands.runs import folder_of

    folder = folder_of(checkpoint)
    if folder is None:
        return None
    trainer = check_yaml(folder / "config.yaml").get("trainer") or {}
    return trainer.get("precision")


def _closing(command: str, trainer: Any, task: Any, checkpoint: Path, folder: Path) -> str:
    from zoo.commands.tables import facts
    from zoo.tasks.base import Task

    lines = [("checkpoint", str(checkpoint))]
    stage = "val" if command == "validate" else "test"
    if isinstance(task, Task):
        lines += task.headline({k: float(v) for k, v in trainer.callback_metrics.items()}, stage)
        lines += task.left(folder, "test") if command == "test" else []
    return facts(lines)
