"""`zoo validate` and `zoo test`: the accuracy of a checkpoint on its own data, or on other data of the same classes."""

import tempfile
from pathlib import Path
from typing import Any

from zoo.commands.arguments import Parser, need
from zoo.errors import UsageError

_ABOUT = "Accuracy of a run's best checkpoint, on the data it was trained with or on --data.root DIR."
_MORE = """frequent overrides: --data.root DIR   --data.test_split NAME   --data.batch_size N   --data.num_workers N
  --trainer.accelerator cpu   --trainer.precision 32-true"""


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
        print(_closing(command, cli.trainer, checkpoint, folder))


def _build(checkpoint: Path, configs: list[str], overrides: list[str], folder: Path) -> Any:
    import yaml

    from zoo.commands.lightning_cli import ZooCLI
    from zoo.commands.wiring import wire_evaluation

    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "checkpoint.yaml"
        own.write_text(yaml.safe_dump(settings_of(checkpoint)), encoding="utf-8")
        return ZooCLI([str(own), *configs], overrides, wire=lambda config: wire_evaluation(config, folder))


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The model and data that a checkpoint was trained with, as a recipe.

    Raises:
        UsageError: it is no checkpoint of a run.
    """
    import torch

    from zoo.tasks.plain import plain
    from zoo.tasks.weights import read_file

    content = read_file(checkpoint)
    if not isinstance(content, dict) or not {"hyper_parameters", "datamodule_hyper_parameters"} <= set(content):
        raise UsageError(f"{checkpoint} is no checkpoint of a run (it says nothing about its network and its data)")
    settings: dict[str, Any] = {"seed_everything": 0}
    for key, stored, default in (
        ("model", "hyper_parameters", "zoo.tasks.Classification"),
        ("data", "datamodule_hyper_parameters", "zoo.data.ImageClassification"),
    ):
        values = {k: plain(v) for k, v in content[stored].items() if not k.startswith("_")}
        settings[key] = {"class_path": content[stored].get("_class_path") or default, "init_args": values}
    for section, key in (("model", "class_names"), ("model", "img_size"), ("model", "in_chans"), ("data", "seed")):
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


def _closing(command: str, trainer: Any, checkpoint: Path, folder: Path) -> str:
    prefix = "val" if command == "validate" else "test"
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    top1, top5 = metrics.get(f"{prefix}/top1"), metrics.get(f"{prefix}/top5")
    lines = [f"checkpoint  {checkpoint}"]
    if top1 is not None and top5 is not None:
        where = "validation" if command == "validate" else "test"
        lines.append(f"accuracy    top-1 {top1:.2%}, top-5 {top5:.2%} on the {where} images")
    if command == "test":
        lines.append(f"pictures    {folder / 'pictures'}: test_confusion_matrix.png, test_worst_mistakes.png")
    return "\n".join(lines)
