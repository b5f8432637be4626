"""LightningCLI as `zoo` uses it: one parser, plain errors, values that the data hands to the network."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from zoo.commands.parse_errors import check_yaml, plain
from zoo.errors import UsageError
from zoo.resources import find_recipe

# Options that another one decides, and what to do instead of giving them.
_LINKED = {
    "model.class_names": "the names are read from the data",
    "model.palette": "the colours are read from the data",
    "model.ignore_index": "give --data.ignore_index",
    "model.img_size": "give --data.img_size (--data.crop_size in segmentation)",
    "model.in_chans": "give --data.in_chans",
    "data.seed": "give --seed_everything",
}


class ZooCLI(LightningCLI):
    """Parses recipes and overrides, and makes data, task and trainer from them.

    Args:
        configs: names or paths of recipes; later ones win.
        overrides: the rest of the command line; wins over all recipes.
        wire: called with the trainer's keyword arguments and the task just before the trainer is made; adds loggers and
            callbacks.
        before: called when everything is parsed and nothing is made yet.

    Raises:
        UsageError: unknown recipe or option, wrong type, or a constructor refuses.
    """

    def __init__(
        self,
        configs: Sequence[str],
        overrides: Sequence[str],
        *,
        wire: Callable[[dict[str, Any], LightningModule], None],
        before: Callable[[], None] = lambda: None,
    ):
        self._wire, self._before = wire, before
        paths = [find_recipe(name) for name in configs]
        contents = [check_yaml(path) for path in paths]
        _refuse_comparisons(configs, contents)
        _refuse_linked(contents, overrides)
        arguments = [part for path in paths for part in ("--config", str(path))] + list(overrides)
        super().__init__(
            args=arguments,
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The whole datamodule is the source, so that one without class names still works with a task that needs none.
        parser.link_arguments("data", "model.init_args.class_names", compute_fn=_class_names, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.palette", compute_fn=_palette, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.img_size", compute_fn=_img_size)
        parser.link_arguments("data", "model.init_args.ignore_index", compute_fn=_ignore_index)
        parser.link_arguments("data.init_args.in_chans", "model.init_args.in_chans")
        # One seed decides everything: the weights, the order of the images and how they are changed.
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
            raise plain(error, parser, args) from error
        for key in ("model", "data"):
            if self.config.get(key) is None:
                raise UsageError(f"there is no {key}: give a recipe (--config NAME, see `zoo list recipes`)")

    def before_instantiate_classes(self) -> None:
        self._before()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            # jsonargparse reports a constructor's own error inside a page about unions of types.
            own = _own(error)
            if type(own) is ValueError:
                raise UsageError(str(own)) from error
            if own is error:
                raise
            raise own from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> Trainer:
        given = config.get("callbacks") or []
        config["callbacks"] = (given if isinstance(given, list) else [given]) + callbacks
        plugins = config.get("plugins") or []
        config["plugins"] = plugins if isinstance(plugins, list) else [plugins]
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False
        self._wire(config, self.model)
        return self.trainer_class(**config)

    def config_yaml(self) -> str:
        """Everything that was decided, as a recipe that makes the same run again."""
        return self.parser.dump(self.config, skip_unset=False)


def _class_names(data: LightningDataModule) -> list[str]:
    return list(getattr(data, "class_names", ()))


def _palette(data: LightningDataModule) -> list[list[int]]:
    return [list(colour) for colour in getattr(data, "palette", ())]


def _img_size(data: Any) -> Any:
    # Networks that see crops are made for the size of those. A recipe without data is told so later.
    options = data.init_args if data is not None else {}
    return options.crop_size if "crop_size" in options else options.get("img_size")


def _ignore_index(data: Any) -> int:
    return data.init_args.get("ignore_index", 255) if data is not None else 255


def _seed(seed: bool | int) -> int:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed_everything {seed}: a seed lies between 0 and {2**32 - 1}")
    return 0 if isinstance(seed, bool) else seed


def _refuse_comparisons(names: Sequence[str], contents: Sequence[dict]) -> None:
    for name, content in zip(names, contents, strict=True):
        if "recipe" in content:
            raise UsageError(f"{name!r} is a comparison, not the recipe of one run: zoo compare --config {name}")


def _refuse_linked(contents: Sequence[dict], overrides: Sequence[str]) -> None:
    """Raises UsageError for an option that is taken from elsewhere: it would be overwritten in silence."""
    for name, advice in _LINKED.items():
        section, _, key = name.partition(".")
        options = (f"--{name}", f"--{section}.init_args.{key}")
        given = any(argument.split("=")[0] in options for argument in overrides)
        for content in contents:
            part = content.get(section)
            given = given or (isinstance(part, dict) and key in (part.get("init_args") or {}))
        if given:
            raise UsageError(f"{name} is no option of its own: {advice}")


def _own(error: BaseException) -> BaseException:
    """The first error that is complete on its own, where there is one: what caused it tells less. Else the last."""
    while not isinstance(error, UsageError) and (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error


def describe(data: LightningDataModule, task: LightningModule, folder: Path) -> str:
    """One line about what is about to be trained."""
    parameters = sum(p.numel() for p in task.parameters())
    name = task.hparams.get("backbone", type(task).__name__)
    if method := task.hparams.get("method") or task.hparams.get("head"):
        name = f"{method} on {name}"
    classes = len(getattr(data, "class_names", ()))
    return f"{name}: {parameters / 1e6:.2f} M parameters{f', {classes} classes' if classes else ''} -> {folder}"
