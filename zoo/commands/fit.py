"""`zoo fit`: trains from a recipe into a run folder, or goes on with one."""

import os
import shlex
import time
from pathlib import Path
from typing import Any

from zoo.commands.arguments import Parser, need
from zoo.errors import UsageError

_ABOUT = """Train from a recipe. Everything a run leaves lies in its folder: config.yaml, metrics.csv, tensorboard/,
checkpoints/, pictures/, record.json."""
_MORE = """frequent overrides (any option of the recipe can be given; values after = or a space):
  --data.root DIR                   your images: DIR/train/CLASS/*.jpg (and val/, test/), or DIR/CLASS/*.jpg
  --data.batch_size N   --data.img_size N   --data.num_workers N   --data.on_error raise
  --model.backbone NAME             any timm model; ours: zoo list backbones
  --model.attn NAME                 attention inside our backbones: zoo list attentions
  --model.lr X   --model.pretrained FILE
  --trainer.max_epochs N   --trainer.max_time DD:HH:MM:SS   --trainer.accelerator cpu
  --seed_everything N
  --print_config                    the whole recipe with every default
  --model.help zoo.tasks.Classification    --data.help zoo.data.ImageClassification    --help-all
detectors of defects (--config anomaly/l2bt): --data.root DIR with good images in DIR or DIR/train/good
  --model.help zoo.tasks.AnomalyDetection  --data.help zoo.data.AnomalyDetection
a class for every pixel (--config segmentation/camvid): --data.root DIR with train/images, train/masks and classes.txt
  --model.head NAME   --model.pretrained FILE   --data.crop_size N
  --model.help zoo.tasks.Segmentation      --data.help zoo.data.Segmentation"""
# Children that Lightning starts for further devices run the same line; they must join the parent's run.
_RUN_OF_PARENT = "ZOO_RUN_FOLDER"


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo fit`."""
    parser = Parser(command, "--config RECIPE [--run NAME] [--resume] [overrides]", _ABOUT, _MORE)
    parser.add_argument("--config", "-c", action="append", default=[], metavar="RECIPE", help="name or path")
    parser.add_argument("--run", metavar="NAME", help="run folder runs/NAME, or a path (default: time and recipe)")
    parser.add_argument("--resume", action="store_true", help="continue --run from its newest checkpoint")
    parser.add_argument("--help-all", action="store_true", help="every option of the trainer and of the task")
    options, overrides = parser.parse_known_args(arguments)
    need("train", "lightning", "jsonargparse", "rich", "torchmetrics")
    if options.help_all:
        overrides.append("--help")
    elif not (options.config or options.resume or any(o.startswith("--model") for o in overrides)):
        raise UsageError("give a recipe: zoo fit --config NAME_OR_PATH. Shipped ones: zoo list recipes")

    from zoo.commands.quiet import quiet

    quiet()
    if options.resume:
        _resume(options.run, options.config, overrides)
    else:
        _fresh(options.run, options.config, overrides)


def _fresh(name: str | None, configs: list[str], overrides: list[str]) -> None:
    from zoo.commands.runs import check_unused, fresh_name, run_folder

    inherited = os.environ.get(_RUN_OF_PARENT)
    folder = Path(inherited) if inherited else run_folder(name or fresh_name(configs[-1] if configs else None))
    if not inherited:
        check_unused(folder)
    _train(folder, configs, overrides, checkpoint=None, step=None)


def _resume(name: str | None, configs: list[str], overrides: list[str]) -> None:
    from zoo.commands.runs import checkpoint_to_resume, run_folder

    if name is None:
        raise UsageError("which run is to be resumed? Give it: zoo fit --run NAME --resume")
    folder = run_folder(name)
    checkpoint, step = checkpoint_to_resume(folder)
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise UsageError(f"{folder} has checkpoints but no config.yaml: this run cannot be resumed by its name")
    _train(folder, [str(saved), *configs], overrides, checkpoint, step)


def _train(folder: Path, configs: list[str], overrides: list[str], checkpoint: Path | None, step: int | None) -> None:
    from zoo.commands.failures import while_running
    from zoo.commands.lightning_cli import ZooCLI, describe
    from zoo.commands.resuming import check_resumable
    from zoo.commands.runs import clear_empty, probe
    from zoo.commands.wiring import wire_fit

    existed = folder.exists()

    def wire(config: dict[str, Any], task: Any) -> None:
        wire_fit(config, task, folder, step)

    try:
        cli = ZooCLI(configs, overrides, wire=wire, before=lambda: probe(folder))
        # Data that is not as described is bad usage, which leaves no run behind.
        if hasattr(cli.datamodule, "check"):
            cli.datamodule.check()
        if checkpoint is not None:
            check_resumable(checkpoint, cli.model, cli.datamodule)
    except BaseException:
        if not existed:
            clear_empty([folder, folder.parent])
        raise
    os.environ[_RUN_OF_PARENT] = str(folder)
    try:
        if cli.trainer.is_global_zero:
            _write_config(folder, cli.config_yaml())
            print(describe(cli.datamodule, cli.model, folder))
            if checkpoint is not None:
                print(f"resuming from {checkpoint} after {step} updates")
        resume = f"zoo fit --run {shlex.quote(_name(folder))} --resume"
        started = time.monotonic()
        with while_running(resume, kept=str(folder / "checkpoints")):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if cli.trainer.is_global_zero:
            print(_closing(folder, cli.trainer, cli.model, cli.datamodule, time.monotonic() - started, step))
    finally:
        os.environ.pop(_RUN_OF_PARENT, None)


def _write_config(folder: Path, text: str) -> None:
    partial = folder / ".config.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "config.yaml")


def _closing(folder: Path, trainer: Any, task: Any, data: Any, seconds: float, step: int | None) -> str:
    """Where the run is, how good it is, and what to type next."""
    from lightning.pytorch.callbacks import ModelCheckpoint, Timer

    from zoo.commands.tables import facts
    from zoo.tasks.base import Task

    if trainer.global_step == step:
        left = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
        over = any(seconds is not None and seconds <= 0 for seconds in left)
        more = "--trainer.max_time DD:HH:MM:SS, all of its time together" if over else "--trainer.max_epochs N"
        return f"{folder} is trained to its end already. To train it further: --resume {more}"
    monitor = getattr(task, "monitor", None)
    savers = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.monitor == monitor]
    best = next((float(c.best_model_score) for c in savers if c.best_model_score is not None), None)
    lines = [("run", f"{folder}: {trainer.current_epoch} epochs, {trainer.global_step} updates, {seconds:.0f} s")]
    if isinstance(task, Task):
        lines += task.headline({k: float(v) for k, v in trainer.callback_metrics.items()}, "val", best)
        lines += task.left(folder, "val")
    name = shlex.quote(_name(folder))
    following = [f"zoo export {name} model.onnx", f"zoo predict {name} IMAGES..."]
    if getattr(data, "hparams", {}).get("test_split") or getattr(data, "has_test", False):
        following.append(f"zoo test --run {name}")
    lines += [("next" if i == 0 else "", line) for i, line in enumerate(following)]
    return facts(lines)


def _name(folder: Path) -> str:
    from zoo.commands.runs import ROOT

    return folder.name if folder.parent == ROOT else str(folder)
